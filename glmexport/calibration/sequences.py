"""Documents into token sequences of one length: packed without padding, every language at its quota."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.calibration.corpus import Document
from glmexport.checkpoint import Tokenizer
from glmexport.errors import InputError
from glmexport.recipe import CalibrationPlan

#: Below this share of the planned tokens the Hessians would describe too little text to be trusted.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class CalibrationSet:
    """``ids`` [sequences, length] int64, and the language of each sequence.

    The first ``prefix`` positions of each sequence are the tokenizer's ([gMASK]<sop>). They draw attention from
    everywhere and their activations dwarf all others, so Hessians leave them out.
    """

    ids: Tensor
    languages: tuple[str, ...]
    prefix: int

    @property
    def tokens_per_language(self) -> dict[str, int]:
        """Positions that Hessians count, by language in order of first appearance."""
        counted = self.ids.shape[1] - self.prefix
        return {language: self.languages.count(language) * counted for language in dict.fromkeys(self.languages)}

    @property
    def tokens(self) -> int:
        """Positions that Hessians count."""
        return sum(self.tokens_per_language.values())

    def weights(self) -> Tensor:
        """Weight of every counted position of each sequence [sequences] fp32; all weights sum to one.

        Each language has a share of the Hessian proportional to the square root of its tokens: a language with
        little text is heard above its token count, without its few tokens owning the result.
        """
        counts = self.tokens_per_language
        total = sum(count**0.5 for count in counts.values())
        return torch.tensor([counts[language] ** 0.5 / total / counts[language] for language in self.languages])

    def digest(self) -> str:
        """SHA-256 of the token ids in order."""
        return "sha256:" + hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, plan: CalibrationPlan, context_length: int
) -> CalibrationSet:
    """Cut the documents of each language into sequences until its share of the tokens is reached.

    Documents of a language follow one another, each led in by the tokenizer's prefix; a sequence that would begin
    inside a document begins with the prefix too. What does not fill a whole sequence is left out.

    Raises:
        InputError: the text yields less than a quarter of the planned tokens.
    """
    length = min(plan.sequence_length, context_length)
    present = {document.language for document in documents}
    quota = {language: share for language, share in plan.quota.items() if language in present}
    sequences: list[list[int]] = []
    languages: list[str] = []
    for language, share in quota.items():
        wanted = max(1, round(plan.tokens * share / sum(quota.values()) / length))
        texts = [document.text for document in documents if document.language == language]
        packed = _pack_language(texts, tokenizer, length, wanted)
        sequences += packed
        languages += [language] * len(packed)
    tokens = len(sequences) * length
    if tokens < plan.tokens * _LEAST_SHARE:
        raise InputError(
            f"The calibration text is too small: {tokens} tokens in whole sequences of {length}, "
            f"of {plan.tokens} that the recipe plans.",
            next_step="Give more text with --calibration, or a recipe with a smaller calibration.tokens.",
        )
    return CalibrationSet(torch.tensor(sequences, dtype=torch.int64), tuple(languages), len(tokenizer.prefix))


def _pack_language(texts: Sequence[str], tokenizer: Tokenizer, length: int, wanted: int) -> list[list[int]]:
    prefix = tokenizer.prefix
    sequences: list[list[int]] = []
    current = list(prefix)
    for text in texts:
        ids = tokenizer.encode(text)
        # A rendered conversation brings the prefix along.
        rest = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
        if rest and current != prefix:
            current += prefix
        while rest:
            room = max(0, length - len(current))
            current += rest[:room]
            rest = rest[room:]
            if len(current) >= length:
                # A prefix that did not fit is cut off here and begins the next sequence whole.
                sequences.append(current[:length])
                if len(sequences) == wanted:
                    return sequences
                current = list(prefix)
    return sequences
