"""The shares of a bundle's divergence: its linears, its head and embedding, the runtime's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import Share
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import Answers, Streamed, compare
from glmexport.validation.reference import TextStream, pass_together
from glmexport.validation.routing import Routes
from glmexport.validation.texts import EvaluationText


def bundle_answer(session: ScoringSession, texts: Sequence[EvaluationText], index: int) -> Tensor:
    """Return the bundle's logits [positions, vocabulary] fp32 at the judged positions of text ``index``."""
    text = texts[index]
    return torch.from_numpy(session.logits(text.ids.numpy())[text.prefix - 1 : -1])


def _mean(divergences: Sequence[Divergence]) -> float:
    return float(torch.cat([each.kl for each in divergences]).double().mean())


def shares_of(
    bundle: Bundle,
    original: Streamed,
    shipped: Sequence[Divergence],
    texts_each: int,
    scratch: Path,
    progress: Progress,
    routes: Routes,
) -> tuple[Share, ...]:
    """Return what the linears, the head and embedding, and the runtime's arithmetic each add to the mean KL.

    The bundle's own weights are run in the reference's fp32 arithmetic: first only the linears of the blocks in the
    original's place, then the embedding and lm_head too, side by side through each block; the exported graph itself, of
    which ``shipped`` are the divergences, is the last step. The experts that all the bundle's weights together choose
    are added to ``routes``.
    """
    recipe = bundle.manifest.recipe
    if recipe.linears is None or not texts_each:
        return ()
    reference, sample = original.reference, original.texts
    architecture = reference.architecture
    weights = BundleWeights.open(bundle, architecture)
    table, head = weights.quantized(architecture.embedding), weights.quantized(architecture.lm_head.weight)
    folded = Reference(reference.checkpoint.folded(bundle_folds(bundle.directory)), architecture)
    given = folded.exchanged(weights.dequantized)
    streams = [TextStream(given, sample, scratch, routes=None if table else routes)]
    if table:
        # What it computes differs from the first stream's by its embeddings alone.
        embedded = folded.exchanged(weights.dequantized, table.lookup)
        streams.append(TextStream(embedded, sample, scratch, routes=routes))
    states = pass_together(given, streams, progress, "Shares: the bundle's weights")
    linears, whole = states[0], states[-1]

    def mean(answers: Answers) -> float:
        return _mean(compare(original, answers, progress, "Shares: comparing"))

    only_linears = mean(lambda index: reference.logits(linears.states(index)))
    project = head.apply if head else reference.logits
    all_weights = mean(lambda index: project(whole.states(index))) if table or head else only_linears
    note = f"{sum(text.positions for text in sample)} positions"
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
            kl_mean_nats=_mean(shipped) - all_weights,
            note=f"the exported graph at accuracy_level {bundle.target.weights.accuracy_level}",
        ),
    )
