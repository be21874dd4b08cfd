"""Token sequences of one length made of documents: packed without padding, every language at its quota."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from glmexport.calibration.corpus import Document
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import CalibrationPlan
from glmexport.tokenizer.tokenizer import Tokenizer

#: Below this share of the planned tokens the Hessians would describe too little text to be trusted.
_LEAST_SHARE = 0.25
#: One sequence in so many is held out of the Hessians, to choose between solutions.
_SELECTION_EVERY = 8
#: Positions that agree in so many last tokens, their own included, give a matrix almost the same input.
_CONTEXT = 4


@dataclass(frozen=True)
class CalibrationSet:
    """The sequences ``ids`` [sequences, length] int64, and the language of each.

    The first ``prefix`` positions of each sequence are the tokenizer's ([gMASK]<sop>). They draw attention from
    everywhere and their activations dwarf all others, so Hessians leave them out.

    ``selection`` [sequences] bool marks the sequences that no Hessian sees: what is fitted on the others is judged
    on these.
    """

    ids: Tensor
    languages: tuple[str, ...]
    prefix: int
    selection: Tensor

    @property
    def tokens_per_language(self) -> dict[str, int]:
        """The positions that Hessians count, by language in order of first appearance."""
        return self._positions(~self.selection)

    @property
    def tokens(self) -> int:
        """The number of positions that Hessians count."""
        return sum(self.tokens_per_language.values())

    @property
    def selection_tokens(self) -> int:
        """The number of positions held out of the Hessians."""
        return sum(self._positions(self.selection).values())

    def weights(self) -> Tensor:
        """Return the weight of every counted position of each sequence [sequences] fp32.

        The weights sum to one over the positions that Hessians count, and to one over those held out. Each language
        has a share proportional to the square root of its tokens: a language with little text is heard above its
        token count, without its few tokens owning the result.
        """
        weights = torch.zeros(len(self.languages))
        for part in (~self.selection, self.selection):
            counts = self._positions(part)
            total = sum(count**0.5 for count in counts.values())
            for index, language in enumerate(self.languages):
                if part[index]:
                    weights[index] = counts[language] ** 0.5 / total / counts[language]
        return weights

    @cached_property
    def effective_tokens(self) -> float:
        """The number of equally weighted positions that would be as precise as those counted (``effective_count``)."""
        contexts = self.contexts[~self.selection, self.prefix :]
        weights = self.weights()[~self.selection, None].expand(contexts.shape)
        return effective_count(contexts.flatten(), weights.flatten())

    @cached_property
    def contexts(self) -> Tensor:
        """A number [sequences, length] for the last four tokens at each position, the same where they are the same."""
        last = pad(self.ids, (_CONTEXT - 1, 0), value=-1).unfold(1, _CONTEXT, 1)
        context: Tensor = torch.unique(last.flatten(0, 1), dim=0, return_inverse=True)[1]
        return context.reshape(self.ids.shape)

    def _positions(self, part: Tensor) -> dict[str, int]:
        counted = self.ids.shape[1] - self.prefix
        members = [language for language, inside in zip(self.languages, part.tolist(), strict=True) if inside]
        return {language: members.count(language) * counted for language in dict.fromkeys(members)}

    def digest(self) -> str:
        """Return the SHA-256 of the token ids in order, and of which sequences are held out."""
        content = self.ids.numpy().tobytes() + self.selection.numpy().tobytes()
        return "sha256:" + hashlib.sha256(content).hexdigest()


def effective_count(contexts: Tensor, weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2 of positions with ``contexts`` [n] int64 and ``weights`` [n] (Kish 1965); 0 of none.

    Positions with the same last four tokens count once, with their mean weight: the same text again tells a Hessian
    nothing new.
    """
    if not len(contexts):
        return 0.0
    _, context, count = torch.unique(contexts, return_inverse=True, return_counts=True)
    once = torch.zeros(len(count), dtype=torch.float64).index_add_(0, context, weights.double()) / count
    return float(once.sum() ** 2 / once.square().sum())


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, plan: CalibrationPlan, context_length: int
) -> CalibrationSet:
    """Cut the documents of each language into sequences until its share of the tokens is reached.

    Documents of a language follow one another, each led in by the tokenizer's prefix; a sequence that would begin
    inside a document begins with the prefix too. What does not fill a whole sequence is left out. One
    sequence in eight is held out for selection, in documents of its own where its language has enough of them.

    Raises:
        InputError: the text yields less than a quarter of the planned tokens.
    """
    length = min(plan.sequence_length, context_length)
    present = {document.language for document in documents}
    quota = {language: share for language, share in plan.quota.items() if language in present}
    sequences: list[list[int]] = []
    languages: list[str] = []
    selection: list[bool] = []
    for language, share in quota.items():
        wanted = max(1, round(plan.tokens * share / sum(quota.values()) / length))
        texts = [document.text for document in documents if document.language == language]
        # Languages with few sequences take turns, and none gives its last one away.
        due = (len(sequences) + wanted) // _SELECTION_EVERY - sum(selection)
        packed, held = _divide(texts, tokenizer, length, wanted, min(due, wanted - 1))
        sequences += packed
        languages += [language] * len(packed)
        selection += [False] * (len(packed) - held) + [True] * held
    tokens = len(sequences) * length
    if tokens < plan.tokens * _LEAST_SHARE:
        raise InputError(
            f"The calibration text is too small: {tokens} tokens in whole sequences of {length}, "
            f"of {plan.tokens} that the recipe plans.",
            next_step="Give more text with --calibration, or a recipe with a smaller calibration.tokens.",
        )
    return CalibrationSet(
        torch.tensor(sequences, dtype=torch.int64), tuple(languages), len(tokenizer.prefix), torch.tensor(selection)
    )


def _divide(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, wanted: int, held: int
) -> tuple[list[list[int]], int]:
    """Return at most ``wanted`` sequences of one language, and how many of them, the last ones, are held out."""
    fitted, used = _pack_language(texts, tokenizer, length, wanted - held)
    apart, _ = _pack_language(texts[used:], tokenizer, length, held)
    if len(apart) == held:
        return fitted + apart, held
    # Too few documents to give some away: the last sequences may share a document with the one before them.
    packed, _ = _pack_language(texts, tokenizer, length, wanted)
    return packed, min(held, max(0, len(packed) - 1))


def _pack_language(texts: Sequence[str], tokenizer: Tokenizer, length: int, wanted: int) -> tuple[list[list[int]], int]:
    """Return at most ``wanted`` sequences, and the number of documents that they are taken from."""
    prefix = tokenizer.prefix
    sequences: list[list[int]] = []
    current = list(prefix)
    for used, text in enumerate(texts):
        if len(sequences) == wanted:
            return sequences, used
        rest = tokenizer.sequence(text)[len(prefix) :]
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
                    return sequences, used + 1
                current = list(prefix)
    return sequences, len(texts)
