"""Tasks with several answers to choose from: how likely each is after the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.questions import task_prompt
from glmexport.validation.behaviour.tasks import Task, score_choice
from glmexport.validation.texts import EvaluationText


def choice_texts(tasks: Sequence[Task], tokenizer: Tokenizer) -> list[EvaluationText]:
    """Return prompt and choice of every task with choices, in order; the choice is encoded by itself."""
    texts = []
    for task in tasks:
        if task.choices is not None:
            prompt = task_prompt(task, tokenizer)
            for choice in task.choices:
                ids = torch.tensor([*prompt, *tokenizer.encode(choice)])
                texts.append(EvaluationText(task.id, task.language or "", ids, len(prompt)))
    return texts


def choice_scores(
    tasks: Sequence[Task], texts: Sequence[EvaluationText], logits: Callable[[int], Tensor]
) -> Mapping[str, float]:
    """Return the score of each of ``tasks`` by id.

    ``logits(index)`` [positions, vocabulary] predict the choice of a text.
    """
    likely = []
    for index, text in enumerate(texts):
        log_p = logits(index).double().log_softmax(-1)
        likely.append(float(log_p.gather(-1, text.targets[:, None]).sum()))
    scores, start = {}, 0
    for task in tasks:
        if task.choices is not None:
            stop = start + len(task.choices)
            scores[task.id] = score_choice(task, likely[start:stop])
            start = stop
    return scores
