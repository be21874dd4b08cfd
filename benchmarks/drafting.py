"""Passes and tokens that the original's answers take, simulated: drafts refused at random, no model and no clock.

    python -m benchmarks.drafting [--output FILE]

Beside it, the same with drafts to the end of an answer and the whole text computed in every pass, which takes the
fewest passes and needs no keys and values from one to the next. Costs are in tokens, a pass as ``PASS_TOKENS``.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmexport.validation.behaviour.drafting import PASS_TOKENS, DraftLengths

REFUSED = (0.003, 0.01, 0.03, 0.1, 0.3)
#: Answers of a default validation, few of them, and longer ones behind longer prompts.
SHAPES = ((270, 64, 64), (20, 64, 64), (60, 400, 256))


@dataclass
class Simulated:
    """What answers took, in passes and in tokens that the original computed and needed."""

    passes: int = 0
    computed: int = 0
    needed: int = 0

    @property
    def cost(self) -> int:
        """Passes and tokens together, in tokens."""
        return self.passes * PASS_TOKENS + self.computed


def simulate(refused: float, *, answers: int, prompt: int, length: int, seed: int = 0) -> Simulated:
    """Return what answers of one length take whose drafted tokens are ``refused`` at random."""
    chance = random.Random(seed)
    lengths, found = DraftLengths(answers), Simulated(needed=answers * (prompt + length))
    done, computed = [0] * answers, [0] * answers
    # Number of drafted tokens up to one that is refused.
    right = [_agreed(chance, refused) for _ in range(answers)]
    while unfinished := [index for index in range(answers) if done[index] < length]:
        found.passes += 1
        for index in unfinished:
            checked = min(lengths.checked(index, len(unfinished)), length - done[index]) - 1
            found.computed += prompt + done[index] - computed[index] + checked
            agreed, was_refused = min(checked, right[index]), right[index] <= checked
            computed[index] = prompt + done[index] + agreed
            done[index] += agreed + 1
            lengths.see(index, agreed + (not was_refused), was_refused)
            right[index] = _agreed(chance, refused) if was_refused else right[index] - agreed - 1
    return found


def whole_texts(refused: float, *, answers: int, prompt: int, length: int, seed: int = 0) -> Simulated:
    """Return the same with drafts to the end and the whole text computed in every pass."""
    chance = random.Random(seed)
    found, done = Simulated(needed=answers * (prompt + length)), [0] * answers
    while unfinished := [index for index in range(answers) if done[index] < length]:
        found.passes += 1
        found.computed += len(unfinished) * (prompt + length)
        for index in unfinished:
            done[index] += _agreed(chance, refused) + 1
    return found


def _agreed(chance: random.Random, refused: float) -> int:
    count = 0
    while count < 1000 and chance.random() >= refused:
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    rows: list[dict[str, Any]] = []
    for answers, prompt, length in SHAPES:
        for refused in REFUSED:
            shape = {"answers": answers, "prompt": prompt, "length": length}
            now, whole = simulate(refused, **shape), whole_texts(refused, **shape)
            rows.append({**shape, "refused": refused, "now": asdict(now), "whole": asdict(whole)})
            print(
                f"{answers:4} answers of {length:3} tokens behind {prompt:3}, {refused:5.1%} refused: "
                f"{now.passes:3} passes, {now.computed / now.needed:.2f} tokens computed a token needed; "
                f"whole texts {whole.passes:2} and {whole.computed / whole.needed:5.2f}, "
                f"{whole.cost / now.cost:4.1f} times the cost"
            )
    if output := parser.parse_args().output:
        output.write_text(json.dumps({"pass_tokens": PASS_TOKENS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
