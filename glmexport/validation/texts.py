"""What a bundle is judged on: documents that no calibration saw, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.calibration.corpus import Document
from glmexport.tokenizer.tokenizer import Tokenizer


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


def text_digest(texts: Sequence[EvaluationText]) -> str:
    """SHA-256 over everything that is asked."""
    content = [[text.document, text.language, text.prefix, text.ids.tolist()] for text in texts]
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def evaluation_texts(
    documents: Sequence[Document], tokenizer: Tokenizer, *, positions_per_language: int, longest: int
) -> list[EvaluationText]:
    """Documents in order until each language has its positions; each cut to ``longest`` tokens, none padded."""
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
