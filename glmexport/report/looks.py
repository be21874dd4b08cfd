"""The part of the evaluation text that was judged, in words and as table cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glmexport.report import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glmexport.results.fidelity import Fidelity
    from glmexport.results.looks import LanguageLooks, Look

LOOK_HEADS = ("Language", "Ended with look", "Documents", "Positions", "Level of each test, look by look")


def told_looks(fidelity: Fidelity) -> str | None:
    """Return what the looks came to, in sentences; None where all text was judged at once."""
    if not fidelity.looks:
        return None
    early = [looks for looks in fidelity.looks if looks.ended_early]
    judged, there = (sum(look.positions for look in each) for each in _ends(fidelity.looks))
    plan = (
        f"The text was judged in at most {max(len(looks.planned) for looks in fidelity.looks)} looks, planned before "
        "anything was measured; a language ends with the first at which all its gates are decided."
    )
    if not early:
        return f"{plan} None was before its text ended."
    return (
        f"{plan} {len(early)} of {len(fidelity.looks)} languages ended early: {text.number(judged)} of "
        f"{text.number(there)} positions were judged. The bounds of gates hold for all looks together. Means and "
        "standard errors of a language that ended early are conditional on that, and may look better or surer than all "
        "of its text would show; --full-text judges all."
    )


def _ends(looks: Sequence[LanguageLooks]) -> tuple[list[Look], list[Look]]:
    return [each.last for each in looks], [each.whole for each in looks]


def look_rows(fidelity: Fidelity) -> list[tuple[str, ...]]:
    """Return the cells of a row a language, the language's tag first."""
    return [
        (
            each.language,
            f"{each.taken} of {len(each.planned)}",
            f"{text.number(each.last.documents)} of {text.number(each.whole.documents)}",
            f"{text.number(each.last.positions)} of {text.number(each.whole.positions)}",
            ", ".join(text.percent(look.level, 2) for look in each.planned),
        )
        for each in fidelity.looks
    ]
