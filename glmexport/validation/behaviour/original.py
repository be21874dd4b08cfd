"""Answers of the original, in as few passes through it as another model's answers differ from them.

A draft is what the bundle answers. One pass of the original over prompt and draft says at every position what it would
have said itself; up to the first difference, the draft is its greedy answer. From there the bundle drafts again. That
is speculative decoding (Leviathan et al., arXiv 2211.17192) with drafts of the whole answer, and blocks that are read
once a pass for all answers together: no machine is too small for it, and the answers do not depend on the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText

#: The function ``draft(index, answer so far)`` returns what the bundle would go on with, to the end.
Draft = Callable[[int, list[int]], list[int]]

#: The function ``finished(index, answer so far)`` tells whether what follows is of no interest.
Finished = Callable[[int, list[int]], bool]

#: Number of answers that go through a block together.
_BATCH = 8


def verified_answers(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    *,
    limits: Sequence[int],
    ends: Collection[int],
    scratch: Path,
    progress: Progress,
    finished: Finished = lambda *_: False,
) -> tuple[list[list[int]], int]:
    """Return the original's greedy answer to each of ``prompts``, each cut at the number of tokens in ``limits``.

    The end token is included, if it comes. An answer that is ``finished`` is gone on with no further, and may be some
    tokens longer. Returns the answers and the number of passes that it took.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished, passes = list(range(len(prompts))), 0
    while unfinished:
        passes += 1
        drafts = {index: draft(index, answers[index])[: limits[index] - len(answers[index])] for index in unfinished}
        # Of one length or nearly so beside each other, for the sake of padding.
        order = sorted(unfinished, key=lambda index: len(prompts[index]) + len(answers[index]) + len(drafts[index]))
        texts = [
            EvaluationText(
                str(index),
                "",
                torch.tensor([*prompts[index], *answers[index], *drafts[index]]),
                len(prompts[index]) + len(answers[index]),
            )
            for index in order
        ]
        states = reference_states(
            reference, texts, scratch, progress, label=f"Original's answers, pass {passes}", batch=_BATCH
        )
        for place, index in enumerate(order):
            # The last row says what follows the whole draft.
            rows = states.load(place)[0, texts[place].prefix - 1 :]
            wanted = reference.logits(rows).argmax(-1).tolist()
            answers[index] += accepted(drafts[index], wanted, ends, limits[index] - len(answers[index]))
        unfinished = [
            index
            for index in unfinished
            if len(answers[index]) < limits[index]
            and not (answers[index] and answers[index][-1] in ends)
            and not finished(index, answers[index])
        ]
    return answers, passes


def accepted(draft: Sequence[int], wanted: Sequence[int], ends: Collection[int], room: int) -> list[int]:
    """Return the draft as far as it is what the original ``wanted``, and the token that it wanted next.

    At most ``room`` tokens, and nothing behind one of ``ends``.
    """
    tokens: list[int] = []
    for place, token in enumerate(wanted):
        if len(tokens) == room:
            break
        tokens.append(token)
        if token in ends or place == len(draft) or draft[place] != token:
            break
    return tokens
