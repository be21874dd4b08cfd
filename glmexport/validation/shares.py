"""The shares of a bundle's divergence: its linears, its head and embedding, the runtime's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Progress
from glmexport.quantization.ranks import Parcel
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import Share
from glmexport.results.routing import LayerRouting
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import compare_texts
from glmexport.validation.noise import consecutive
from glmexport.validation.pieces import Pieces
from glmexport.validation.reference import ReferenceStates, TextStream, pass_together
from glmexport.validation.routing import Routes, routing_agreement
from glmexport.validation.shared_texts import SharedTexts
from glmexport.validation.texts import EvaluationText

_WALK = "shares-walk"


def bundle_answer(session: ScoringSession, texts: Sequence[EvaluationText], index: int) -> Tensor:
    """Return the bundle's logits [positions, vocabulary] fp32 at the judged positions of text ``index``."""
    text = texts[index]
    return torch.from_numpy(session.logits(text.ids.numpy())[text.prefix - 1 : -1])


def shares_of(
    bundle: Bundle,
    shared: SharedTexts,
    shipped: Sequence[Divergence],
    texts_each: int,
    pieces: Pieces,
    scratch: Path,
    progress: Progress,
) -> tuple[tuple[Share, ...], tuple[LayerRouting, ...]]:
    """Return what the linears, the head and embedding, and the runtime's arithmetic each add to the mean KL.

    The bundle's own weights are run in the reference's fp32 arithmetic: first only the linears of the blocks in the
    original's place, then the embedding and lm_head too, side by side through each block; the exported graph itself, of
    which ``shipped`` are the divergences, is the last step. Beside them is how often all the bundle's weights together
    choose the experts that the original does.
    """
    recipe = bundle.manifest.recipe
    if recipe.linears is None or not texts_each:
        return (), ()
    passes = _Passes(bundle, shared, scratch, progress)
    names = [shared.name(index) for index in shared.repeated]

    def compute(absent: Sequence[int]) -> Iterator[tuple[int, Parcel]]:
        own = pieces.ranks.own(shared.repeated)
        walked = [names[index] for index in own]
        yield from passes.compare(own, absent, pieces.walk(_WALK, walked))
        pieces.drop_walk(_WALK, walked)

    before, after = Routes(), Routes()
    linears, whole = [], []
    for parcel in pieces.each("shares", names, compute):
        first, second, *experts = parcel.tensors
        linears.append(first)
        whole.append(first if second is None else second)
        layers = parcel.facts
        for place, layer in enumerate(layers):
            for routes, chosen in ((before, experts[place]), (after, experts[len(layers) + place])):
                assert chosen is not None
                routes.add(layer, chosen)
    only_linears, all_weights = _mean(linears), _mean(whole)
    note = f"{sum(text.positions for index in shared.repeated for text in shared.texts(index))} positions"
    return (
        Share(
            name=f"{'mixed' if recipe.budget else recipe.linears.label} linears of the blocks",
            kl_mean_nats=only_linears,
            note=f"fp32 arithmetic, {note}",
        ),
        Share(
            name="Embedding and lm_head",
            kl_mean_nats=all_weights - only_linears,
            note="in their formats, fp32 arithmetic",
        ),
        Share(
            name="Runtime arithmetic",
            kl_mean_nats=_mean([each.kl for each in shipped]) - all_weights,
            note=f"the exported graph at accuracy_level {bundle.target.weights.accuracy_level}",
        ),
    ), routing_agreement(before, after)


class _Passes:
    """The passes of a bundle's weights through the reference's arithmetic."""

    def __init__(self, bundle: Bundle, shared: SharedTexts, scratch: Path, progress: Progress) -> None:
        self._shared, self._scratch, self._progress = shared, scratch, progress
        reference, architecture = shared.reference, shared.reference.architecture
        weights = BundleWeights.open(bundle, architecture)
        self._table = weights.quantized(architecture.embedding)
        self._head = weights.quantized(architecture.lm_head.weight)
        folded = Reference(reference.checkpoint.folded(bundle_folds(bundle.directory)), architecture)
        self._given = folded.exchanged(weights.dequantized)
        # What it computes differs from the first stream's by its embeddings alone.
        self._embedded = folded.exchanged(weights.dequantized, self._table.lookup) if self._table else None

    def compare(
        self, own: Sequence[int], absent: Sequence[int], kept: WorkDirectory | None
    ) -> Iterator[tuple[int, Parcel]]:
        """Yield the divergences of batches with the linears and with all weights, and the experts of both models.

        Of its ``own`` batches, which pass the blocks, those that are ``absent`` are compared. Finished blocks are
        committed to ``kept``.
        """
        shared, progress = self._shared, self._progress
        texts = [text for index in own for text in shared.texts(index)]
        groups = consecutive([len(shared.texts(index)) for index in own])
        streams = [
            TextStream(reference, texts, self._scratch, routes=Routes(), groups=groups)
            for reference in (self._given, self._embedded)
            if reference
        ]
        passed = pass_together(self._given, streams, progress, "Shares: the bundle's weights", kept)
        routes = streams[-1].routes
        assert routes is not None
        rows = consecutive([sum(len(texts[place].ids) for place in group) for group in groups])
        project = self._head.apply if self._head else shared.reference.logits
        sides = 2 if self._table or self._head else 1
        count = sum(len(shared.texts(index)) for index in absent)
        with progress.track("Shares: comparing", sides * count) as track:
            for index, group, span in zip(own, groups, rows, strict=True):
                if index not in absent:
                    continue
                original = shared.original(index)
                linears, whole = passed[0].only(group), passed[-1].only(group)
                first = compare_texts(original, partial(_answer, shared.reference.logits, linears), track)
                second = compare_texts(original, partial(_answer, project, whole), track) if sides == 2 else None
                before = shared.routes(index)
                after = [experts[span.start : span.stop] for experts in routes.layers.values()]
                parcel = (_joined(first), None if second is None else _joined(second), *before.values(), *after)
                yield index, Parcel(parcel, list(before))


def _answer(project: Callable[[Tensor], Tensor], states: ReferenceStates, index: int) -> Tensor:
    return project(states.states(index))


def _joined(divergences: Sequence[Divergence]) -> Tensor:
    return torch.cat([each.kl for each in divergences])


def _mean(parts: Sequence[Tensor | None]) -> float:
    return float(torch.cat([part for part in parts if part is not None]).double().mean())
