"""The provenance of a target: the hardware that its figures come from, and the reason for each key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.inheritance import DefinitionSource

#: The text that stands for a claim: the extended target's claim about the same key holds for this target too.
INHERITED = "inherited"


class Claim(Definition):
    """The reason why one key of a target has its value, and how that is known."""

    #: Measured: timed or compared in numbers. Executed: it ran and gave the right numbers. Read: documentation or
    #: source says so, nothing was run. Chosen: a preference, not a fact.
    how: Literal["measured", "executed", "read", "chosen"]
    why: str


class Provenance(Definition):
    """The sources of a target's figures."""

    #: Whether bundles for this target have run on hardware of its class.
    executed: bool = False
    #: The machine and the runtime of what was measured or executed; of a target that was not, what was read instead.
    measured_on: str
    date: str
    notes: str = ""
    #: Claims by the key that each is about, as ``graph.packed_qkv``.
    claims: dict[str, Claim] = Field(default_factory=dict)
    #: Limitations: what cannot be done for this target yet, a sentence each.
    not_yet: tuple[str, ...] = ()


def inherited_claims(source: DefinitionSource) -> tuple[str, ...]:
    """Return the keys whose claims ``source`` takes from the target that it extends."""
    return tuple(key for key, claim in _claims(source.stated).items() if claim == INHERITED)


def with_inherited_claims(source: DefinitionSource) -> dict[str, Any]:
    """Return the table of a target in which each claim that it inherits is written out.

    Provenance tells of hardware, so none is inherited in silence: a target names each claim of the extended one that
    holds for it as well. Such a claim is about the same value, and is no measurement, which other hardware gave.

    Raises:
        DefinitionError: a claim that cannot be inherited; names the key and both files.
    """
    table = source.resolved
    inherited = inherited_claims(source)
    if not inherited:
        return table
    base = source.base_stated or {}
    claims = _claims(base)
    for key in inherited:
        claim = claims.get(key)
        if not isinstance(claim, dict):
            reason = "the extended target has no such claim" if source.base else "no target is extended"
        elif claim.get("how") == "measured":
            reason = "what was measured on other hardware is not inherited"
        elif _value(table, key) != _value(base, key):
            reason = "the extended target's claim is about another value"
        else:
            continue
        raise DefinitionError(
            f"{source}: provenance.claims.{key}: {reason}.",
            next_step="Write how this target's value is known, and why it was chosen.",
        )
    written = {key: claims[key] if key in inherited else claim for key, claim in _claims(table).items()}
    return {**table, "provenance": {**table["provenance"], "claims": written}}


def _claims(table: dict[str, Any]) -> dict[str, Any]:
    claims = _value(table, "provenance.claims")
    return claims if isinstance(claims, dict) else {}


def _value(table: dict[str, Any], key: str) -> object:
    """Return what a table has at a dotted key; None where it has nothing."""
    value: object = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
