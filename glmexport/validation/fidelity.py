"""The original compared with a bundle on text: a language at a time, over all, and where they differ most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from glmexport.foundation.progress import Progress, Track
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import CaptureBound, Estimate, Fidelity, LanguageFidelity, PositionBand, WorstToken
from glmexport.results.looks import LanguageLooks
from glmexport.results.record import badness
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.divergence import Divergence, divergence
from glmexport.validation.reference import ReferenceStates
from glmexport.validation.statistics import Kind, clustered_mean
from glmexport.validation.texts import EvaluationText, text_digest

#: Positions whose logits the original computes at a time: for every time its whole lm_head is read.
_HEAD_POSITIONS = 512
#: Positions that are compared at a time: over a large vocabulary, in fp64, these few are in the processor's caches.
_POSITIONS = 16
_WORST_TOKENS = 12
_CONTEXT_TOKENS = 24
#: Edges of the histogram of KL, nats: half decades.
_EDGES = (0.0, *(10 ** (exponent / 2) for exponent in range(-10, 4)))

#: Positions at which the bands of positions begin.
_BANDS = (0, 16, 64, 256, 1024, 4096, 16384, 1 << 40)

#: Logits [positions, vocabulary] of one text's judged positions.
Answers = Callable[[int], Tensor]


class OriginalAnswers(Protocol):
    """The original's answers to ``texts``, computed now or captured earlier."""

    @property
    def texts(self) -> Sequence[EvaluationText]:
        """The texts that were asked about."""

    def divergence(self, index: int, given: Tensor) -> Divergence:
        """Return how far logits ``given`` [positions, vocabulary] fp32 of text ``index`` are from the original's."""


class ChosenAnswers:
    """The original's answers to some of the texts that it was asked about."""

    def __init__(self, answers: OriginalAnswers, indices: Sequence[int]) -> None:
        self._answers = answers
        self._indices = indices

    @property
    def texts(self) -> Sequence[EvaluationText]:
        """The chosen texts."""
        return [self._answers.texts[index] for index in self._indices]

    def divergence(self, index: int, given: Tensor) -> Divergence:
        """Return how far logits ``given`` of chosen text ``index`` are from the original's."""
        return self._answers.divergence(self._indices[index], given)


class Streamed:
    """The original's answers over the whole vocabulary, computed from its hidden states."""

    def __init__(self, states: ReferenceStates, reference: Reference) -> None:
        self.states = states
        self.reference = reference

    @property
    def texts(self) -> Sequence[EvaluationText]:
        """The texts that were asked about."""
        return self.states.texts

    def divergence(self, index: int, given: Tensor) -> Divergence:
        """Return how far logits ``given`` [positions, vocabulary] fp32 of text ``index`` are from the original's."""
        original, targets = self.states.states(index), self.texts[index].targets
        slices = zip(self.logits(original), position_slices(len(targets)), strict=True)
        return Divergence.concatenate([divergence(logits, given[each], targets[each]) for logits, each in slices])

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n, vocabulary] fp32 of each of ``position_slices`` of ``states`` [positions, hidden]."""
        for span in torch.split(states, _HEAD_POSITIONS):
            yield from torch.split(self.reference.logits(span), _POSITIONS)


def position_slices(positions: int) -> list[slice]:
    """Return slices of positions whose distributions over the whole vocabulary are computed at a time."""
    return [slice(start, min(start + _POSITIONS, positions)) for start in range(0, positions, _POSITIONS)]


def compare(original: OriginalAnswers, answers: Answers, progress: Progress, label: str) -> list[Divergence]:
    """Return the divergence of every text; ``answers(index)`` gives the bundle's logits of text ``index``."""
    with progress.track(label, len(original.texts)) as track:
        return compare_texts(original, answers, track)


def compare_texts(original: OriginalAnswers, answers: Answers, track: Track) -> list[Divergence]:
    """Return what ``compare`` does, and count every text on ``track``."""
    divergences = []
    for index, text in enumerate(original.texts):
        divergences.append(original.divergence(index, answers(index)))
        track.advance(1, text.language)
    return divergences


def summarize(
    texts: Sequence[EvaluationText],
    divergences: Sequence[Divergence],
    tokenizer: Tokenizer,
    arithmetic: str,
    noise: LanguageFidelity | None = None,
    capture: CaptureBound | None = None,
    *,
    looks: tuple[LanguageLooks, ...] = (),
    digest: str | None = None,
) -> Fidelity:
    """Return statistics per language and over all positions.

    Args:
        texts: what was judged.
        divergences: of each of them.
        tokenizer: the original's.
        arithmetic: what the bundle computes with, in words.
        noise: of the original against itself.
        capture: what an original that was captured hides.
        looks: how the text was judged, where not all at once.
        digest: of all text, where not all was judged; None: of ``texts``.
    """
    languages = list(dict.fromkeys(text.language for text in texts))
    rows = tuple(
        statistics_of(
            language, [part for text, part in zip(texts, divergences, strict=True) if text.language == language]
        )
        for language in languages
    )
    everything = torch.cat([part.kl for part in divergences])
    counts, _ = np.histogram(everything.clamp(max=_EDGES[-1]).numpy(), bins=np.array(_EDGES))
    return Fidelity(
        languages=rows,
        overall=statistics_of("all", divergences),
        worst_language=max(rows, key=lambda row: badness(row.kl_mean_nats)).language,
        kl_histogram_edges_nats=_EDGES,
        kl_histogram_counts=tuple(int(count) for count in counts),
        worst_tokens=_worst_tokens(texts, divergences, tokenizer),
        arithmetic=arithmetic,
        bands=_bands(divergences),
        noise_floor=noise,
        capture=capture,
        text_digest=text_digest(texts) if digest is None else digest,
        looks=looks,
    )


def statistics_of(language: str, documents: Sequence[Divergence]) -> LanguageFidelity:
    """Return the statistics of all positions of ``documents``, one after the other."""
    of = Divergence.concatenate(list(documents))
    kl = of.kl.double()

    def estimate(values: Callable[[Divergence], Tensor], kind: Kind) -> Estimate:
        found = [values(document).double() for document in documents]
        return clustered_mean([float(each.sum()) for each in found], [len(each) for each in found], kind)

    change = (-of.nll_bundle.double()).exp() - (-of.nll_original.double()).exp()
    return LanguageFidelity(
        language=language,
        documents=len(documents),
        positions=len(kl),
        perplexity_original=_perplexity(of.nll_original),
        perplexity_bundle=_perplexity(of.nll_bundle),
        kl_mean_nats=float(kl.mean()),
        kl_p50_nats=float(kl.quantile(0.5)),
        kl_p99_nats=float(kl.quantile(0.99)),
        kl_p999_nats=float(kl.quantile(0.999)),
        kl_max_nats=float(kl.max()),
        top1_agreement=float((of.top_original == of.top_bundle).double().mean()),
        rms_delta_p=float(change.square().mean().sqrt()),
        kl=estimate(lambda each: each.kl, "positive"),
        ln_perplexity_ratio=estimate(lambda each: each.nll_bundle.double() - each.nll_original, "signed"),
        top1_disagreement=estimate(lambda each: each.top_original != each.top_bundle, "share"),
    )


def _bands(documents: Sequence[Divergence]) -> tuple[PositionBand, ...]:
    bands = []
    for start, stop in pairwise(_BANDS):
        inside = [(each.kl[start:stop].double(), each.top_original[start:stop] == each.top_bundle[start:stop])
                  for each in documents if len(each.kl) > start]  # fmt: skip
        if not inside:
            break
        counts = [len(kl) for kl, _ in inside]
        bands.append(
            PositionBand(
                first=start,
                last=start + max(counts) - 1,
                kl=clustered_mean([float(kl.sum()) for kl, _ in inside], counts, "positive"),
                top1_agreement=sum(int(same.sum()) for _, same in inside) / sum(counts),
            )
        )
    return tuple(bands)


def _perplexity(nll: Tensor) -> float:
    try:
        return math.exp(float(nll.double().mean()))
    except OverflowError:
        return math.inf


def _worst_tokens(
    texts: Sequence[EvaluationText], divergences: Sequence[Divergence], tokenizer: Tokenizer
) -> tuple[WorstToken, ...]:
    """Return the positions of highest KL where the most likely token changed, at most one a document."""
    worst = []
    for text, of in zip(texts, divergences, strict=True):
        changed = torch.where(of.top_original != of.top_bundle, of.kl, -1.0)
        position = int(changed.argmax())
        if float(changed[position]) < 0:
            continue
        end = text.prefix + position
        worst.append(
            WorstToken(
                language=text.language,
                document=text.document,
                position=position,
                context=tokenizer.decode(text.ids[max(text.prefix, end - _CONTEXT_TOKENS) : end].tolist()),
                expected=tokenizer.decode([int(of.top_original[position])], skip_special=False),
                given=tokenizer.decode([int(of.top_bundle[position])], skip_special=False),
                kl_nats=float(of.kl[position]),
                probability_original=float(of.p_original[position]),
                probability_bundle=float(of.p_bundle[position]),
            )
        )
    return tuple(sorted(worst, key=lambda token: -token.kl_nats)[:_WORST_TOKENS])
