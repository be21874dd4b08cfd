"""Facts about the machine at hand: what it is, and what memory it has."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from glmexport.foundation.errors import MachineError
from glmexport.foundation.host import cpu_flags

_LIBRARIES = (
    "glmexport",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "numpy",
)
#: Instruction sets that decide which kernels ONNX Runtime takes.
_TELLING_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def processor_name() -> str:
    """Return the processor's own name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this processor that matter to quantized kernels."""
    return tuple(flag for flag in _TELLING_FLAGS if flag in cpu_flags())


def cores() -> int:
    """Return the number of physical cores that this process may use."""
    usable = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else psutil.cpu_count()
    return min(usable or 1, psutil.cpu_count(logical=False) or usable or 1)


def memory_bytes() -> int:
    """Return the size of physical memory in bytes."""
    return int(psutil.virtual_memory().total)


def system_name() -> str:
    """Return operating system, release and architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def state_folder() -> Path:
    """Return the user's folder for what a later command has to find as it was: ``$XDG_STATE_HOME/glmexport``.

    Without that variable, or where it is a relative path, it is in ``~/.local/state``, as the XDG Base Directory
    Specification says.

    Raises:
        MachineError: the user has no home directory, and no other folder is named.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or "")
    if base.is_absolute():
        return base / "glmexport"
    try:
        return Path.home() / ".local/state/glmexport"
    except RuntimeError as error:
        raise MachineError(
            f"There is no folder for what is kept between commands: {error}",
            next_step="Set XDG_STATE_HOME to a folder.",
        ) from error


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries whose arithmetic the result depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Run from a checkout without installation, or onnxruntime under its GPU name.
            continue
    return found


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, bytes."""
    return peak_memory_and_source()[0]


def peak_memory_and_source() -> tuple[int, str]:
    """Return the peak resident memory of this process so far in bytes, and the source of the figure.

    Resident, not PSS: pages of weights that another process happens to map are counted whole, as they are needed where
    this process is the only one. Not the cgroup's: that is the whole container's, its page cache included.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its figure starts from the parent's, which a child shares until it starts its own program.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024, "VmHWM"
    process = psutil.Process().memory_info()
    if hasattr(process, "peak_wset"):
        return int(process.peak_wset), "peak working set"
    return int(process.rss), "resident memory at the end"
