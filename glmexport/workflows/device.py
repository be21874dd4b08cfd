"""The device that a build quantizes on: the processor, or a CUDA device that gets one block at a time.

Only quantization runs there. A bundle is validated where it will serve, on the provider that its target names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from glmexport.architecture.description import Architecture
from glmexport.formats.plan import allows_coarse
from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.recipe import Recipe
from glmexport.quantization.memory import MemoryPlan, plan_memory
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import CPU
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

#: Share of a device's free memory that a plan may fill: its allocator cannot use every gap between blocks.
_USABLE = 0.9


def open_device(name: str) -> torch.device:
    """Return the device ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: another name, or a number that no device of this machine has.
        MachineError: torch sees no CUDA device.
    """
    if name == "cpu":
        return CPU
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise InputError(f"There is no device {name!r}.", next_step="Give cpu, cuda, or cuda:0, cuda:1, ...")
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds none"
        raise MachineError(
            f"--device {name}: this machine has no CUDA device that torch can use; torch {torch.__version__} {why}.",
            next_step="Install a driver and a torch with CUDA, or leave --device out to quantize on the processor.",
        )
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"There is no device {name}: this machine has {count}.", next_step="Count from cuda:0.")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return a name for people: ``cpu``, or the product's name and the number."""
    return "cpu" if device == CPU else f"{torch.cuda.get_device_name(device)} ({device})"


def product_name(device: torch.device) -> str:
    """Return what ``device_name`` does without the number: the same for devices that compute the same."""
    return "cpu" if device == CPU else torch.cuda.get_device_name(device)


def plan_on(device: torch.device, architecture: Architecture, recipe: Recipe, limit_bytes: int | None) -> MemoryPlan:
    """Return a plan that keeps the walk within ``limit_bytes``, and within what is free on ``device``.

    Raises:
        MachineError: even the smallest batches do not fit.
    """
    if device == CPU:
        return plan_memory(architecture, recipe, limit_bytes)
    free = int(torch.cuda.mem_get_info(device)[0] * _USABLE)
    if limit_bytes is not None and limit_bytes <= free:
        return plan_memory(architecture, recipe, limit_bytes)
    try:
        return plan_memory(architecture, recipe, free)
    except MachineError as error:
        raise MachineError(
            f"{device_name(device)} has too little free memory. {error.message}",
            next_step="Free memory on it, take a larger device, or leave --device out to quantize on the processor.",
        ) from error


def arithmetic_on(device: torch.device, arithmetic: OriginalArithmetic) -> OriginalArithmetic:
    """Return the arithmetic of quantization on ``device``: the processor's there, torch's default on others."""
    return arithmetic if device == CPU else UNCHECKED


def arithmetic_for(architecture: Architecture, recipe: Recipe, arithmetic: OriginalArithmetic) -> OriginalArithmetic:
    """Return ``arithmetic`` as far as ``recipe`` allows it: calibration in bf16 loses what 8 bits keep."""
    return arithmetic if allows_coarse(architecture, recipe) else arithmetic.fine


@contextmanager
def running_on(device: torch.device, arithmetic: OriginalArithmetic) -> Iterator[None]:
    """Compute by ``arithmetic`` within this context, and say what to do when the memory of ``device`` runs out.

    Raises:
        MachineError: the memory ran out.
    """
    try:
        with computing(arithmetic):
            yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"The memory of {device_name(device)} ran out.",
            next_step="Run the same command again with a lower --max-memory; it goes on after the last finished block.",
        ) from error


def peak_device_memory(device: torch.device) -> int:
    """Return the most bytes of tensors on ``device`` so far; 0 for the processor, whose memory is the process's."""
    return 0 if device == CPU else torch.cuda.max_memory_allocated(device)
