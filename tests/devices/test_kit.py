"""A job that is carried to a device and answered there by one command."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from builds import Run, Sample
from devices.conftest import answered

from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.kit import KitResultRunner, write_kit
from glmexport.devices.local import LocalRunner
from glmexport.foundation.errors import EXIT_INPUT, EXIT_MACHINE, InputError, MachineError
from glmexport.foundation.progress import Silent
from glmexport.report.document import read_report


def carried(kit: Path, place: Path) -> Path:
    """What somebody does on the device; its results.zip."""
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(place)
        assert "python3 program.pyz" in archive.read("glmexport-kit/README.txt").decode()
    folder = place / "glmexport-kit"
    subprocess.run([sys.executable, "program.pyz"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "results.zip"


@pytest.fixture(scope="module")
def brought(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kit")
    write_kit(job, place / "kit.zip", Silent())
    return carried(place / "kit.zip", place)


def test_there_and_back(job: Path, brought: Path, tmp_path: Path) -> None:
    KitResultRunner("kit", brought)(job, tmp_path / "results", Silent())
    answers = DeviceAnswers.open("kit", job, tmp_path / "results")
    assert answers.result.speed is not None
    LocalRunner()(job, tmp_path / "local", Silent())
    assert answered(tmp_path / "results") == answered(tmp_path / "local")


def test_nothing_is_overwritten(job: Path, tmp_path: Path) -> None:
    (tmp_path / "kit.zip").write_text("mine")
    with pytest.raises(InputError, match=r"kit\.zip exists"):
        write_kit(job, tmp_path / "kit.zip", Silent())
    assert (tmp_path / "kit.zip").read_text() == "mine"


def test_a_hostile_archive(job: Path, brought: Path, tmp_path: Path) -> None:
    """Names outside of the results are never written, and nothing larger than announced."""
    archive = tmp_path / "results.zip"
    shutil.copyfile(brought, archive)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../escaped", "x")
        file.writestr("/tmp/escaped", "x")
    KitResultRunner("kit", archive)(job, tmp_path / "deep/results", Silent())
    assert not (tmp_path / "deep/escaped").exists()
    DeviceAnswers.open("kit", job, tmp_path / "deep/results")

    with zipfile.ZipFile(brought) as source, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(1 << 26) if name.startswith("answers/0") else source.read(name))
    KitResultRunner("kit", archive)(job, tmp_path / "large", Silent())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "large/answers").iterdir()}
    assert max(sizes.values()) < 1 << 20
    with pytest.raises(MachineError, match=r"answers/0\.safetensors is not the file"):
        DeviceAnswers.open("kit", job, tmp_path / "large")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive(job: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.zip").write_bytes(content)
    with pytest.raises(MachineError, match="cannot be read"):
        KitResultRunner("kit", tmp_path / "results.zip")(job, tmp_path / "results", Silent())
    with pytest.raises(MachineError, match="cannot be read"):
        KitResultRunner("kit", tmp_path / "none.zip")(job, tmp_path / "results", Silent())


def packed(kind: int, name: str = "result.json") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr(name, b"{}" * 100)
    return buffer.getvalue()


def changed(content: bytes, at: int, byte: int) -> bytes:
    """``content`` with another byte at ``at`` of its member's entries: in front of it, and in the list."""
    listed = bytearray(content)
    listed[content.index(b"PK\x01\x02") + at + 2] = byte
    listed[at] = byte
    return bytes(listed)


def many_members() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("result.json", b"{}")
    whole, entry = buffer.getvalue(), b"PK\x01\x02" + bytes(24) + b"\x01" + bytes(17) + b"a"
    directory = entry * 100_000
    return whole + directory + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(directory), len(whole), 0)


@pytest.mark.parametrize(
    "content",
    {
        "lzma": packed(zipfile.ZIP_LZMA),
        "bzip2": packed(zipfile.ZIP_BZIP2),
        "cut lzma": packed(zipfile.ZIP_LZMA).replace(b"\x09\x04\x05\x00", b"\xff" * 4),
        "encrypted": changed(packed(zipfile.ZIP_STORED), 6, 1),
        "of an unknown kind": changed(packed(zipfile.ZIP_STORED), 8, 77),
        "of a later version": changed(packed(zipfile.ZIP_STORED), 4, 255),
        "a name that is no text": packed(zipfile.ZIP_STORED, "\u00e9" * 6).replace(b"\xc3\xa9", b"\xff\xff"),
        "no such member": packed(zipfile.ZIP_STORED, "other"),
        "a checksum of something else": packed(zipfile.ZIP_STORED).replace(b"{}{}", b"{}[]", 1),
        "more members than any job has": many_members(),
        "a list that is cut": packed(zipfile.ZIP_STORED)[:-30] + packed(zipfile.ZIP_STORED)[-22:],
    }.values(),
    ids=lambda content: f"{len(content)} bytes",
)
def test_an_archive_that_cannot_be_unpacked(job: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.zip").write_bytes(content)
    with pytest.raises(MachineError, match=r"results\.zip cannot be read: "):
        KitResultRunner("kit", tmp_path / "results.zip")(job, tmp_path / "results", Silent())


@pytest.mark.parametrize("seed", range(20))
def test_an_archive_with_changed_bytes(job: Path, brought: Path, tmp_path: Path, seed: int) -> None:
    chance, content = random.Random(seed), bytearray(brought.read_bytes())
    directory = content.rindex(b"PK\x05\x06") - 2000
    for _ in range(8):
        content[chance.randrange(max(directory, 0), len(content))] = chance.randrange(256)
    (tmp_path / "results.zip").write_bytes(content)
    with contextlib.suppress(MachineError):
        KitResultRunner("kit", tmp_path / "results.zip")(job, tmp_path / "results", Silent())


def test_a_damaged_member(job: Path, brought: Path, tmp_path: Path) -> None:
    """Of an archive that somebody has packed again: its directory is whole, and what it holds is not."""
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(brought) as source, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with zipfile.ZipFile(archive) as whole:
        member = whole.getinfo("answers/0.safetensors")
    content = bytearray(archive.read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + 40] = b"\xff" * 40
    archive.write_bytes(content)
    with pytest.raises(MachineError, match="cannot be read"):
        KitResultRunner("kit", archive)(job, tmp_path / "results", Silent())


def test_a_full_disk_is_not_the_archives_fault(
    job: Path, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb" and path.is_relative_to(tmp_path / "results"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        KitResultRunner("kit", brought)(job, tmp_path / "results", Silent())


def test_from_the_command_line(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    ask = ("validate", bundle, "--reference", captured, "--device")
    outcome = run(*ask, f"kit:{tmp_path / 'kit.zip'}", "--json")
    assert outcome.code == 0 and outcome.document == {"kits": [str(tmp_path / "kit.zip")]}
    assert "kit-result:FILE" in outcome.stderr
    results = carried(tmp_path / "kit.zip", tmp_path)
    outcome = run(*ask, f"kit-result:{results}", "--json")
    assert outcome.code == 2 and outcome.document["devices"][0]["facts"]["runtime"].startswith("onnxruntime ")
    report = read_report(bundle / "report.json")
    assert report.detailed == f"kit-result:{results}" and report.performance is not None
    # For a checkpoint, the questions would not be found again.
    refused = run("validate", bundle, "--against", sample.checkpoint, "--device", f"kit-result:{results}")
    assert refused.code == EXIT_INPUT and "glmexport reference" in refused.stderr
    # Results of another job.
    outcome = run("validate", bundle, "--reference", captured, "--threads", 2, "--device", f"kit-result:{results}")
    assert outcome.code == EXIT_MACHINE and "answers another job" in outcome.stderr
    assert json.loads((bundle / "report.json").read_text())["detailed"] == report.detailed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")) == []
