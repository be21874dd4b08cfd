"""Whether a bundle can run on a machine, and why not: by what its manifest and its target say, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.host import Host


@dataclass(frozen=True)
class Check:
    """One condition and whether it holds."""

    name: str
    holds: bool
    detail: str


def fit(bundle: Bundle, host: Host) -> list[Check]:
    """Return every condition that ``host`` has to meet for ``bundle``."""
    target = bundle.target
    checks = [Check("hardware of the target's class", False, reason) for reason in target.lacking(host)]
    if not checks:
        checks.append(Check("hardware of the target's class", True, f"{target.name}: {target.summary}"))
    checks.append(_memory(bundle, host))
    return checks


def _memory(bundle: Bundle, host: Host) -> Check:
    """Compare the weights with the memory of what computes with them; caches come on top."""
    needed = bundle.manifest.precision.weight_bytes
    on_gpu = bundle.target.probe.compute_capability is not None
    if on_gpu:
        free, where = max((gpu.memory_bytes for gpu in host.gpus), default=0), "of the GPU"
    else:
        free, where = int(psutil.virtual_memory().available), "free here"
    detail = f"{needed / 2**20:,.0f} MiB of weights, {free / 2**20:,.0f} MiB {where}"
    return Check("memory", needed < free, detail)
