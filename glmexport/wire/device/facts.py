"""The facts about the device: its processor, its memory, and the speed at which it reads memory."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: The instruction sets that decide which kernels ONNX Runtime takes.
_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
#: Bytes to read, several times the size of any cache.
_READ_BYTES = 1 << 28


def device_facts(provider: str, emulated: str | None) -> dict[str, Any]:
    """Return what result.json says of the device."""
    import numpy
    import onnxruntime

    fields, cores = _processor()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()
    if name == platform.machine() and "CPU part" in fields:
        # arm64 has numbers for names.
        name = f"{name} {fields.get('CPU implementer')} {fields['CPU part']}"
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": name,
        "instruction_sets": [flag for flag in _FLAGS if flag in flags],
        "cores": cores,
        "memory_bytes": _memory_bytes(),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "provider": provider,
        "adapter": None,
        "versions": {
            "numpy": numpy.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "emulated": emulated,
    }


def cores() -> int:
    """Return the number of physical cores that this process may use."""
    return _processor()[1]


def _processor() -> tuple[dict[str, str], int]:
    """Return the fields of the first processor in /proc/cpuinfo, and the physical cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fields: dict[str, str] = {}
    found: set[tuple[str | None, ...]] = set()
    with contextlib.suppress(OSError):
        one: dict[str, str] = {}
        for line in [*Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines(), ""]:
            key, colon, value = (part.strip() for part in line.partition(":"))
            if colon:
                one[key] = value
                fields.setdefault(key, value)
            elif one:
                names = ("physical id", "core id") if "core id" in one else ("processor",)
                found.add(tuple(one.get(name) for name in names))
                one = {}
    return fields, max(1, min(usable, len(found) or usable))


def _memory_bytes() -> int | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def peak_memory() -> tuple[int | None, str]:
    """Return the peak resident memory of this process so far in bytes, and the source of the figure."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024, "VmHWM"
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024, "ru_maxrss"
    return None, "This system does not tell it."


def memory_bandwidth(threads: int) -> float | None:
    """Return the bytes per second at which ``threads`` threads read memory: the best of five readings of 256 MiB.

    None where there is no room for as much. The largest of integers reads every byte once and writes nothing, as a sum
    would, and is found faster than memory is read; a sum of floats is not.
    """
    import numpy as np

    best = 0.0
    with contextlib.suppress(MemoryError), ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(np.ones(_READ_BYTES // 4, np.int32), threads)
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = max(best, _READ_BYTES / (time.perf_counter() - started))
    return best or None
