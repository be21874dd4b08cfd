"""Where the figures and choices of a target come from: the hardware, and the reason for each key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmexport.foundation.definition import Definition


class Claim(Definition):
    """Why one key of a target has its value, and how that is known."""

    #: Measured: timed or compared in numbers. Executed: it ran and gave the right numbers. Read: documentation or
    #: source says so, nothing was run. Chosen: a preference, not a fact.
    how: Literal["measured", "executed", "read", "chosen"]
    why: str


class Provenance(Definition):
    """Where the figures come from."""

    #: Whether bundles for this target have run on hardware of its class.
    executed: bool = False
    #: The machine and the runtime of what was measured or executed; of a target that was not, what was read instead.
    measured_on: str
    date: str
    notes: str = ""
    #: By the key that each is about, as ``graph.packed_qkv``.
    claims: dict[str, Claim] = Field(default_factory=dict)
    #: What cannot be done for this target yet, a sentence each.
    not_yet: tuple[str, ...] = ()
