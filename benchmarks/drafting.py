"""Passes and tokens that the original's answers take, simulated: drafts refused at random, no model and no clock.

    python -m benchmarks.drafting [--output FILE]

Drafts are a bundle's, which computes eight answers in a step. Beside it, the same with a new draft behind every token
that is refused; and with drafts to the end of an answer and the whole text computed in every pass, which takes the
fewest passes and needs no keys and values from one to the next. Costs are in tokens, a pass as ``PASS_TOKENS``.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmexport.validation.behaviour.drafting import FREE, PASS_TOKENS, DraftCost, DraftLengths

REFUSED = (0.003, 0.01, 0.03, 0.1, 0.3)
#: Answers of a default validation, few of them, and longer ones behind longer prompts.
SHAPES = ((273, 54, 64), (31, 54, 64), (8, 54, 64), (60, 400, 256))
BATCH = 8


@dataclass
class Simulated:
    """What answers took, in passes and in tokens that the original computed and needed."""

    passes: int = 0
    computed: int = 0
    needed: int = 0
    #: What drafts cost, in tokens that the original computes.
    drafting: float = 0.0

    @property
    def cost(self) -> float:
        """Passes, tokens and drafts together, in tokens."""
        return self.passes * PASS_TOKENS + self.computed + self.drafting


def simulate(
    refused: float,
    *,
    answers: int,
    prompt: int,
    length: int,
    cost: DraftCost = FREE,
    again: bool | None = None,
    seed: int = 0,
) -> Simulated:
    """Return what answers of one length take whose drafted tokens are ``refused`` at random.

    The first drafts are there already; new ones have a ``cost``. They are made ``again`` behind every token that is
    refused, or never; None: where they are worth it.
    """
    chance = random.Random(seed)
    lengths, found = DraftLengths(answers, cost=cost), Simulated(needed=answers * (prompt + length))
    done, computed = [0] * answers, [0] * answers
    drafted = [length] * answers
    # Number of drafted tokens up to one that is refused.
    right = [_agreed(chance, refused) for _ in range(answers)]
    while unfinished := [index for index in range(answers) if done[index] < length]:
        found.passes += 1
        for index in unfinished:
            text, room = prompt + done[index], length - done[index]
            checked = min(lengths.checked(index, len(unfinished)), room) - 1
            worth = lengths.worthwhile(index, len(unfinished), text, room) if again is None else again
            if checked and not drafted[index] and worth:
                drafted[index] = min(lengths.drafted(index, len(unfinished)), room)
                found.drafting += cost.text * text + cost.token * drafted[index]
            checked = min(checked, drafted[index])
            found.computed += text - computed[index] + checked
            agreed, was_refused = min(checked, right[index]), right[index] < checked
            # The token that the original wants next may be the one that was drafted.
            more = not was_refused and agreed < drafted[index] and right[index] > agreed
            was_refused = was_refused or (agreed < drafted[index] and not more)
            computed[index] = text + agreed
            done[index] += agreed + 1
            lengths.see(index, agreed + more, was_refused)
            drafted[index] = 0 if was_refused else drafted[index] - agreed - more
            right[index] = _agreed(chance, refused) if was_refused else right[index] - agreed - more
    return found


def whole_texts(
    refused: float, *, answers: int, prompt: int, length: int, cost: DraftCost = FREE, seed: int = 0
) -> Simulated:
    """Return the same with drafts to the end and the whole text computed in every pass."""
    chance = random.Random(seed)
    found, done = Simulated(needed=answers * (prompt + length)), [0] * answers
    while unfinished := [index for index in range(answers) if done[index] < length]:
        found.passes += 1
        found.computed += len(unfinished) * (prompt + length)
        for index in unfinished:
            if done[index]:
                found.drafting += cost.text * (prompt + done[index]) + cost.token * (length - done[index])
            done[index] += _agreed(chance, refused) + 1
    return found


def _agreed(chance: random.Random, refused: float) -> int:
    count = 0
    while count < 1000 and chance.random() >= refused:
        count += 1
    return count


def _said(found: Simulated) -> str:
    computed, drafting = found.computed / found.needed, found.drafting / found.needed
    return f"{found.passes} passes, {computed:.2f} + {drafting:.2f} tokens a token needed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    rows: list[dict[str, Any]] = []
    for answers, prompt, length in SHAPES:
        for refused in REFUSED:
            shape = {"answers": answers, "prompt": prompt, "length": length}
            priced = shape | {"cost": DraftCost.by_bundle(BATCH)}
            now, every = simulate(refused, **priced), simulate(refused, **priced, again=True)
            whole = whole_texts(refused, **priced)
            sides = {"now": now, "every_draft": every, "whole": whole}
            rows.append({**shape, "refused": refused, **{name: asdict(side) for name, side in sides.items()}})
            print(
                f"{answers:4} answers of {length:3} tokens behind {prompt:3}, {refused:5.1%} refused: {_said(now)}; "
                f"a draft behind every refused token: {_said(every)}, {every.cost / now.cost:.1f} times the cost; "
                f"whole texts: {whole.cost / now.cost:.1f} times"
            )
    if output := parser.parse_args().output:
        output.write_text(json.dumps({"pass_tokens": PASS_TOKENS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
