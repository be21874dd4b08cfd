"""The text that a bundle is judged on: documents that no calibration saw, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.calibration.corpus import Document
from glmexport.foundation.errors import InputError
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.conditions import ValidationPlan


@dataclass(frozen=True)
class EvaluationText:
    """One document, led in by the tokenizer's prefix: ``ids`` [length] int64.

    The first ``prefix`` tokens are given; every later one is predicted from those before it.
    """

    document: str
    language: str
    ids: Tensor
    prefix: int

    @property
    def positions(self) -> int:
        """Predictions that are judged."""
        return len(self.ids) - self.prefix

    @property
    def targets(self) -> Tensor:
        """The tokens that are predicted, [positions]."""
        return self.ids[self.prefix :]


@dataclass(frozen=True)
class EvaluationSet:
    """Everything that a bundle and its original are asked: documents that no calibration saw, and the user's tasks."""

    documents: Sequence[Document]
    #: The original's.
    tokenizer: Tokenizer
    tasks: Sequence[Task] = ()

    def texts(self, context_length: int, plan: ValidationPlan) -> list[EvaluationText]:
        """Return as much of the documents as ``plan`` has judged, in tokens, each no longer than the context.

        Raises:
            InputError: nothing would be judged.
        """
        texts = evaluation_texts(
            self.documents,
            self.tokenizer,
            positions_per_language=plan.positions_per_language,
            longest=min(plan.longest_text, context_length),
        )
        if not texts:
            raise InputError("There is no evaluation text.", next_step="Give languages that the corpora have.")
        return texts


def text_digest(texts: Sequence[EvaluationText]) -> str:
    """Return the SHA-256 over everything that is asked."""
    content = [[text.document, text.language, text.prefix, text.ids.tolist()] for text in texts]
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def evaluation_texts(
    documents: Sequence[Document], tokenizer: Tokenizer, *, positions_per_language: int, longest: int
) -> list[EvaluationText]:
    """Return documents in order until each language has its positions, cut to ``longest`` tokens, none padded."""
    prefix = len(tokenizer.prefix or [0])
    used: dict[str, int] = {}
    texts = []
    for document in documents:
        room = positions_per_language - used.get(document.language, 0)
        ids = tokenizer.sequence(document.text, judged=True)[: min(longest, prefix + room)]
        if len(ids) > prefix:
            texts.append(EvaluationText(document.id, document.language, torch.tensor(ids), prefix))
            used[document.language] = used.get(document.language, 0) + len(ids) - prefix
    return texts
