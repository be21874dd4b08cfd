"""A device of another architecture under QEMU's user-mode emulation: it shows the numbers, never the speed.

The emulated side has files of its own in one directory: ``root``, unpacked from Debian's packages of Python for that
architecture, and ``packages``, unpacked from the wheels of numpy and of the onnxruntime that is installed here. Nothing
is installed on this machine for it but QEMU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from glmexport.devices.local import LocalRunner
from glmexport.foundation.cache import cache_folder
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.progress import Progress
from glmexport.foundation.untrusted import SMALL, parse_object, read_regular

QEMU_ARM64 = "qemu-arm64"
EMULATED = "Emulated by QEMU: what is computed is what the architecture computes, but not how fast."

_QEMU = ("qemu-aarch64-static", "qemu-aarch64")
#: A processor with dot products and half precision, which decide the kernels of quantized matrices.
_CPU = "neoverse-n1"
#: /proc/cpuinfo of that processor. QEMU would show this machine's own, from which ONNX Runtime draws wrong conclusions.
_CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
_PACKAGES = ("python3", "libstdc++6", "libgomp1")
#: The platforms in the names of wheels for aarch64 that run on Debian 12 and later.
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_RECORD = "emulated.json"


def default_sysroot() -> Path:
    """Return the default directory of the emulated side's files."""
    return cache_folder() / QEMU_ARM64


def open_emulated(directory: Path | None, name: str = QEMU_ARM64) -> LocalRunner:
    """Return the emulated arm64 device whose files ``prepare`` has put into ``directory``.

    Raises:
        InputError: there are no such files.
        MachineError: QEMU is not installed.
    """
    place = directory or default_sysroot()
    record = place / _RECORD
    if not record.is_file():
        raise InputError(
            f"{place} has no files of an emulated arm64 machine.",
            next_step=f"Make them with: glmexport devices prepare {QEMU_ARM64} {place}",
        )
    try:
        python = place / str(parse_object(read_regular(record, SMALL.size), SMALL)["python"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{record} cannot be read: {error}.", next_step=f"Remove {place}, and prepare the machine again."
        ) from error
    return LocalRunner(
        name=name,
        command=(_qemu(), "-L", str(place / "root"), "-cpu", _CPU, str(python)),
        environment={"PYTHONPATH": str(place / "packages")},
        emulated=EMULATED,
    )


def _qemu() -> str:
    for name in _QEMU:
        found = shutil.which(name)
        if found:
            return found
    raise MachineError(
        "QEMU's user-mode emulation of arm64 is not installed.",
        next_step="Install it, on Debian and Ubuntu with: apt-get install qemu-user-static",
    )


def prepare(directory: Path | None, progress: Progress) -> dict[str, str]:
    """Fetch the emulated arm64 machine's files by apt and pip, and return their versions.

    The configured sources of apt and pip are used. No root is needed: apt keeps its state in the directory too.

    Raises:
        InputError: the directory is there already.
        MachineError: apt, dpkg-deb, pip or a package is not there.
    """
    place = (directory or default_sysroot()).absolute()
    if place.exists():
        raise InputError(f"{place} exists.", next_step="Remove it, or name another directory.")
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "root").mkdir(parents=True)
        with progress.track("Emulated machine", 3) as track:
            archives = _download_debian(partial / "apt")
            track.advance(1, "Debian packages")
            for archive in archives:
                _run("dpkg-deb", "-x", str(archive), str(partial / "root"))
            (python,) = (path for path in (partial / "root/usr/bin").glob("python3.*") if path.suffix[1:].isdigit())
            (partial / "root/proc").mkdir()
            (partial / "root/proc/cpuinfo").write_text(_CPUINFO, encoding="utf-8")
            track.advance(1, "unpacked")
            versions = _download_wheels(partial, python.suffix[1:])
            track.advance(1, "wheels")
        shutil.rmtree(partial / "apt")
        record = {"python": python.relative_to(partial).as_posix(), "versions": versions}
        (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return versions


def _download_debian(folder: Path) -> list[Path]:
    """Download archives of Python for arm64 and of everything that it needs."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    # Nothing counts as installed, so that no package is left out.
    (folder / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": f"{folder}/state",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "Debug::NoLocking": "true",
        "Acquire::Languages": "none",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run("apt-get", *options, "-qq", "update")
    _run("apt-get", *options, "-qq", "--yes", "--no-install-recommends", "--download-only", "install", *_PACKAGES)
    return sorted((folder / "cache/archives").glob("*.deb"))


def _download_wheels(partial: Path, minor: str) -> dict[str, str]:
    """Unpack numpy and onnxruntime into ``packages``, and return their versions."""
    import onnxruntime

    wheels = partial / "wheels"
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *platforms,
        "--implementation", "cp", "--python-version", f"3.{minor}", "--abi", f"cp3{minor}", "--dest", str(wheels),
        f"onnxruntime=={onnxruntime.__version__}", "numpy>=2.2,<3",
    )  # fmt: skip
    versions = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        versions[name] = version
        with zipfile.ZipFile(wheel) as archive:
            # zipfile keeps every name inside the directory.
            archive.extractall(partial / "packages")
    shutil.rmtree(wheels)
    return versions


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    except OSError as error:
        raise MachineError(
            f"{command[0]} cannot be run: {error.strerror}.",
            next_step="Emulated machines are made of Debian's packages, on Debian or Ubuntu.",
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"{command[0]} failed (exit {done.returncode}): {last}",
            next_step="Correct what it says, then run the same command again.",
        )
