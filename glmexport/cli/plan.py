"""The table that ``validate --plan`` shows."""

from __future__ import annotations

from rich.console import Console

from glmexport.cli.console import titled_table
from glmexport.report.text import brief_duration
from glmexport.validation.planning import Need, Plan


def show_plan(console: Console, plan: Plan) -> None:
    """Show of every gate the languages with too little text, or else the one that needs most.

    The time that all of them take follows.
    """
    table = titled_table(
        f"\nDocuments that decide a gate in {plan.power:.0%} of cases, if its measured value is the true one",
        "gate", "language", "measured", "limit", "documents", "needed", "would show",
    )  # fmt: skip
    for gate in dict.fromkeys(need.gate for need in plan.needs):
        for need in _told([need for need in plan.needs if need.gate == gate]):
            enough = need.needed is not None and need.needed <= need.documents
            table.add_row(
                need.gate,
                need.language,
                f"{need.value:.4g}",
                f"{need.limit:g}",
                str(need.documents),
                "too near the limit to tell" if need.needed is None else str(need.needed),
                "-" if need.showable is None else f"{need.showable:.4g}",
                style="" if enough else "yellow",
            )
    console.print(table)
    console.print("would show: the limit nearest to the value that the documents there are would decide", style="dim")
    console.print()
    bundle = plan.rates.bundle_per_position / plan.rates.per_position if plan.rates.per_position else 1.0
    console.print(
        f"now      {plan.documents} documents, {plan.positions} positions: {brief_duration(plan.seconds)} on this "
        f"machine with {plan.rates.threads} threads ({bundle:.0%} of that the bundle's), speed and free answers apart",
        soft_wrap=True,
    )
    if any(each.looks > 1 for each in plan.expected):
        looks = max(each.look for each in plan.expected)
        console.print(
            f"expected {sum(each.documents for each in plan.expected)} of these documents, about "
            f"{plan.expected_positions} positions, in {looks} look{'' if looks == 1 else 's'}: "
            f"{brief_duration(plan.expected_seconds)}, as a language's text ends once its gates are decided; "
            "--full-text takes all",
            soft_wrap=True,
        )
    if plan.needed_documents == plan.documents:
        console.print("needed   no more", soft_wrap=True)
    else:
        console.print(
            f"needed   {plan.needed_documents} documents, about {plan.needed_positions} positions: "
            f"{brief_duration(plan.needed_seconds)}; give more with --evaluation FILE.jsonl and --positions",
            soft_wrap=True,
        )
    if plan.undecidable:
        console.print(f"note     {plan.undecidable} gates are too near their limits to be decided", soft_wrap=True)


def _told(needs: list[Need]) -> list[Need]:
    """Return the languages without enough text, or the one that is nearest to having too little."""
    short = [need for need in needs if need.needed is None or need.needed > need.documents]
    return short or [max(needs, key=lambda need: (need.needed or 0) / need.documents)]
