"""The route that a command computes by: chosen once on a machine by a check, and kept for later commands.

The route is part of what the bytes of a bundle depend on. A build that goes on after it was killed must not take
another one because a measurement came out otherwise, so the choice stays until its file is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from glmexport.foundation import machine
from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import write_atomically
from glmexport.foundation.progress import Progress
from glmexport.foundation.untrusted import SMALL
from glmexport.reference.arithmetic import DEFAULT, ROUTES
from glmexport.reference.arithmetic_check import (
    LARGEST_ERROR,
    check,
    coarse_ratio,
    fastest,
    largest_error,
    moments_ratio,
    products,
)
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic

Wanted = Literal["auto", "fp32"]
#: Seconds to wait for another process that chooses, which takes one.
_WAIT = 60


class ChoiceConditions(Definition):
    """The facts that a choice depends on: the processor, the library, and the number of threads."""

    processor: str
    instruction_sets: tuple[str, ...]
    torch: str
    #: The instruction sets that torch's own kernels are held to.
    capability: str
    threads: int

    @property
    def file(self) -> str:
        """The name of the file of their choice."""
        return f"{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]}.json"


class Choice(Definition):
    """The content of a file: a choice, and the conditions it was made under."""

    conditions: ChoiceConditions
    arithmetic: OriginalArithmetic


def choose_arithmetic(wanted: Wanted, threads: int, progress: Progress) -> OriginalArithmetic:
    """Return the arithmetic that ``wanted`` means on this machine, in so many ``threads``.

    ``auto`` is what was chosen when a command first asked; where nothing is kept, or nothing that can be used, all
    routes are checked, which takes about a second.
    """
    torch.set_num_threads(threads)
    if wanted == DEFAULT.name:
        return UNCHECKED
    try:
        with _locked(machine.state_folder() / "arithmetic" / here().file) as path:
            kept = _kept(path)
            if kept is None:
                kept = measure()
                write_atomically(path, Choice(conditions=here(), arithmetic=kept).model_dump_json(indent=2).encode())
            return kept
    except (OSError, MachineError) as error:
        reason = error.message if isinstance(error, MachineError) else f"{error}."
        progress.remark(
            f"The choice of arithmetic cannot be kept: {reason} An interrupted build goes on only if it comes out "
            "the same next time; --arithmetic fp32 always does."
        )
        return measure()


def here() -> ChoiceConditions:
    """Return the conditions of this process."""
    return ChoiceConditions(
        processor=machine.processor_name(),
        instruction_sets=machine.instruction_sets(),
        torch=str(torch.__version__),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )


def measure() -> OriginalArithmetic:
    """Check every route of this machine, and return the fastest that is right and surely faster, or the default."""
    tried = products()
    others = [route for route in ROUTES.values() if route.offered and route != DEFAULT]
    found = fastest([check(route, tried) for route in others]) or check(DEFAULT, tried)
    coarse = coarse_ratio(found.route)
    # The inputs of moments are rounded only where the text has been.
    moments = None if coarse is None else moments_ratio(found.route)
    return found.arithmetic().model_copy(update={"coarse_ratio": coarse, "moments_ratio": moments})


def _kept(path: Path) -> OriginalArithmetic | None:
    """Return the choice in ``path``; None if there is none, it is damaged, or what it names computes otherwise now."""
    try:
        choice = read_json(Choice, path, SMALL)
    except (OSError, ValueError):
        return None
    route = ROUTES.get(choice.arithmetic.route)
    if choice.conditions != here() or route is None or not route.offered:
        return None
    if route != DEFAULT and not largest_error(route, products()) <= LARGEST_ERROR:
        return None
    return choice.arithmetic


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold ``path`` for this process: of two that ask at once, the second one takes what the first one chooses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=_WAIT):
        yield path
