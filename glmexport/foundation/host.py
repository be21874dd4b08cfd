"""Facts about this machine: the processor's instruction sets, NVIDIA GPUs, and the providers that ONNX Runtime has."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPU_PROVIDER = "CPUExecutionProvider"
#: Names that macOS uses for what Linux lists among an ARM processor's ``Features``.
_APPLE_FLAGS = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
}
_TIMEOUT_S = 10


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    #: Compute capability, such as 8.9.
    compute_capability: float
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    """A machine, as far as targets ask about it."""

    #: Processor architecture as ``platform.machine`` gives it, in lower case.
    machine: str
    #: Instruction sets in Linux's spelling.
    cpu_flags: frozenset[str] = frozenset()
    #: Execution providers of the installed ONNX Runtime.
    providers: tuple[str, ...] = (CPU_PROVIDER,)
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def this(cls) -> Host:
        """Return the machine at hand."""
        return cls(platform.machine().lower(), cpu_flags(), providers(), gpus())

    @property
    def compute_capability(self) -> float | None:
        """The highest compute capability of the GPUs; None without any."""
        return max((gpu.compute_capability for gpu in self.gpus), default=None)


@cache
def cpu_flags() -> frozenset[str]:
    """Return the instruction set flags of this processor in Linux's spelling; empty where they cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            # x86 and ARM.
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    if platform.system() == "Darwin":
        told = dict(line.split(": ", 1) for line in _output("sysctl", *_APPLE_FLAGS).splitlines() if ": " in line)
        return frozenset(flag for key, flag in _APPLE_FLAGS.items() if told.get(key) == "1")
    return frozenset()


@cache
def providers() -> tuple[str, ...]:
    """Return the execution providers that a session can be opened on: compiled in, or of registered plugins."""
    import onnxruntime

    compiled = onnxruntime.get_available_providers()
    plugins = [device.ep_name for device in onnxruntime.get_ep_devices()]
    return tuple(dict.fromkeys([*compiled, *plugins]))


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs as the driver's own tool lists them; none where there is no such tool."""
    return gpus_in(_output("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"))


def gpus_in(listing: str) -> tuple[Gpu, ...]:
    """Return the GPUs that nvidia-smi prints: name, compute capability and MiB, a line each. It skips other lines."""
    found = []
    for line in listing.splitlines():
        try:
            name, capability, mebibytes = (part.strip() for part in line.rsplit(",", 2))
            found.append(Gpu(name, float(capability), int(mebibytes) << 20))
        except ValueError:
            continue
    return tuple(found)


def _output(program: str, *arguments: str) -> str:
    """Return what a tool of the system prints; nothing if it is missing or fails."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603
            [path, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
