"""The check of whether a bundle can run on a machine: by its manifest and its target, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import Manifest
from glmexport.foundation.errors import MachineError
from glmexport.foundation.host import Host
from glmexport.foundation.recipe import Recipe

#: Bytes that a group of weights takes in memory beyond what is stored of it: a scale in fp32 instead of float16, and a
#: sum in fp32.
_GROUP_BYTES = 6
#: Factor of what is seen beyond that: GLM-4.7-Flash's shape in groups of 128 makes 17.0 GiB, and took 18.8.
_BESIDE = 1.1


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
    """Compare what a loaded bundle takes with the memory of the device that computes with it; caches come on top."""
    if bundle.target.probe.compute_capability is not None:
        free, where = max((gpu.memory_bytes for gpu in host.gpus), default=0), "of the GPU"
        needed, what = bundle.manifest.precision.weight_bytes, "of weights"
    else:
        free, where, needed, what = free_bytes(), "free here", _loaded(bundle.manifest), "once it is loaded"
    detail = f"{needed / 2**20:,.0f} MiB {what}, {free / 2**20:,.0f} MiB {where}"
    return Check("memory", needed < free, detail)


def free_bytes() -> int:
    """Return the bytes of memory that a new process can have on this machine, swap included."""
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def loaded_bytes(stored_bytes: int, parameters: int, recipe: Recipe) -> int:
    """Return the bytes that weights take, about, once ONNX Runtime has loaded them for a processor.

    Its kernels have copies of the codes in an order of their own, and for every group a scale and a sum in fp32; what
    was read is let go of.

    Args:
        stored_bytes: the weights as the bundle stores them.
        parameters: the number of weights.
        recipe: the way in which they were quantized.
    """
    groups = parameters // recipe.linears.group_size if recipe.linears else 0
    return int(_BESIDE * (stored_bytes + groups * _GROUP_BYTES))


def _loaded(manifest: Manifest) -> int:
    return loaded_bytes(manifest.precision.weight_bytes, manifest.source.parameters, manifest.recipe)


def lacking_memory(bundle: Bundle, copies: int = 1) -> str | None:
    """Return a sentence where this machine has not the memory to load a bundle for a processor; None where it has.

    So many ``copies`` are loaded side by side, as by the ranks of a build on one host.
    """
    needed, free = _loaded(bundle.manifest), free_bytes()
    if bundle.target.probe.compute_capability is not None or copies * needed <= free:
        return None
    each = f" in each of {copies} ranks" if copies > 1 else ""
    return (
        f"It takes about {needed / 2**30:.1f} GiB of memory{each} once it is loaded, and {free / 2**30:.1f} GiB are "
        "free here."
    )


def require_memory(bundle: Bundle) -> None:
    """Check that this machine has the memory to load a bundle for a processor.

    Raises:
        MachineError: it has not.
    """
    if reason := lacking_memory(bundle):
        raise MachineError(
            f"{bundle.directory} cannot be loaded. {reason}",
            next_step="Free memory, take a larger machine, or build it smaller: groups of 128, or --size.",
        )
