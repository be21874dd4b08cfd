"""What judging text in looks saves, and how often it is wrong, by simulation.

Documents are as heavy-tailed as those by which the tests show what the gates promise: means of documents differ by a
factor of e^0.5, positions by the square of a normal variable. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmexport.validation.looks import plan_looks
from glmexport.validation.sequential import levels
from glmexport.validation.statistics import Kind, bounds, clustered_mean, p_value
from glmexport.validation.texts import EvaluationText

CONFIDENCE = 0.95
LIMITS: dict[Kind, float] = {"positive": 0.05, "signed": 0.03, "share": 0.1}
NAMES = {"positive": "mean KL", "signed": "ln perplexity ratio", "share": "top-1"}
TRUTHS = (0.3, 0.6, 0.9, 1.0, 1.2, 2.0)
#: Languages of a validation, each with three gates: what the strictest of Holm's tests is corrected for.
TESTS = 3 * 21
#: Positions of the documents of a language. The first two are those of shipped text at --positions 2048: Amharic, whose
#: five documents are all there are, and English, cut by --positions.
TEXTS = {
    "5 uneven": [175, 428, 163, 233, 510],
    "5, one a stub": [510, 510, 510, 510, 8],
    "9": [254] * 9,
    "16": [510] * 16,
    "40": [510] * 40,
}


@dataclass(frozen=True)
class Plan:
    """Looks after so many documents, with the level of each for passing, and for blocking among many tests."""

    order: tuple[int, ...]
    ends: tuple[int, ...]
    passing: tuple[float, ...]
    blocking: tuple[float, ...]


def draw(random: np.random.Generator, kind: Kind, mean: float, sizes: np.ndarray) -> np.ndarray:
    """Sums over the positions of each document."""
    if kind == "positive":
        return random.lognormal(-0.5 * 0.5**2, 0.5, len(sizes)) * mean * random.chisquare(sizes)
    if kind == "signed":
        return random.normal(mean, 0.01, len(sizes)) * sizes + random.normal(0, 0.1 * np.sqrt(sizes))
    return random.binomial(sizes, random.beta(60 * mean, 60 * (1 - mean), len(sizes))).astype(float)


def plans(sizes: list[int], power: float | None, tests: int) -> list[Plan]:
    """Plans of texts that differ in their first token, and so in their order; ``power`` None: one look at all."""
    found = []
    for number in range(24):
        ids = [torch.tensor([number, *range(size)]) for size in sizes]
        texts = [EvaluationText(str(index), "en", each, 1) for index, each in enumerate(ids)]
        (plan,) = plan_looks(texts, 1, full_text=power is None)
        passing, blocking = (
            levels(plan.stage(0).fractions, risk, power or 1.0) for risk in (1 - CONFIDENCE, (1 - CONFIDENCE) / tests)
        )
        found.append(Plan(plan.order, plan.ends, passing, blocking))
    return found


def judge(plan: Plan, sums: np.ndarray, sizes: np.ndarray, kind: Kind) -> tuple[str, float]:
    """The verdict of one gate, and the share of the positions that it took."""
    verdict, share = "inconclusive", 1.0
    order = np.array(plan.order)
    for end, passing, blocking in zip(plan.ends, plan.passing, plan.blocking, strict=True):
        chosen = order[:end]
        estimate = clustered_mean(sums[chosen], sizes[chosen], kind)
        share = float(sizes[chosen].sum() / sizes.sum())
        if p_value(estimate, LIMITS[kind]) <= blocking:
            return "block", share
        if bounds(estimate, 1 - passing)[1] <= LIMITS[kind]:
            return "pass", share
    return verdict, share


def measure(sizes: list[int], kind: Kind, truth: float, power: float | None, tests: int, number: int) -> dict[str, Any]:
    random, planned, lengths = np.random.default_rng(20), plans(sizes, power, tests), np.array(sizes)
    found = [
        judge(planned[index % len(planned)], draw(random, kind, truth * LIMITS[kind], lengths), lengths, kind)
        for index in range(number)
    ]
    verdicts = [verdict for verdict, _ in found]
    return {
        **{verdict: verdicts.count(verdict) / number for verdict in ("pass", "inconclusive", "block")},
        "text": float(np.mean([share for _, share in found])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--number", type=int, default=3000, help="Validations that are drawn for each figure.")
    arguments = parser.parse_args()
    rows = []
    print("one gate at a time; pass and block in percent of validations, text in percent of the positions")
    print(f"{'documents':14} {'gate':20} {'spending':10} {'wrong pass':>10} {'wrong block':>11}  text at truth / limit")
    for name, sizes in TEXTS.items():
        for kind in LIMITS:
            for power in (None, 1.0, 2.0, 3.0):
                # At the limit itself, each test alone and uncorrected: what is promised of it.
                wrong = measure(sizes, kind, 1.0, power, 1, arguments.number)
                truths = {
                    str(truth): measure(sizes, kind, truth, power, TESTS, arguments.number // 4) for truth in TRUTHS
                }
                rows.append(
                    {
                        "documents": name, "gate": NAMES[kind], "power_of_spending": power,
                        "wrong_pass": wrong["pass"], "wrong_block": wrong["block"], "by_truth_over_limit": truths,
                    }
                )  # fmt: skip
                told = "full text" if power is None else f"power {power:g}"
                cells = "  ".join(
                    f"{truth}: {each['text']:.0%} ({each['inconclusive']:.0%} open)" for truth, each in truths.items()
                )
                print(
                    f"{name:14} {NAMES[kind]:20} {told:10} {wrong['pass']:10.1%} {wrong['block']:11.1%}  {cells}",
                    flush=True,
                )
    if arguments.output:
        document = {"confidence": CONFIDENCE, "validations": arguments.number, "tests": TESTS, "rows": rows}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
