"""Where the divergence of a bundle comes from: its linears, its head and embedding, the runtime's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.fidelity import Share
from glmexport.validation.fidelity import Answers, Streamed, compare
from glmexport.validation.reference import reference_states
from glmexport.validation.routing import Routes
from glmexport.validation.texts import EvaluationText


def bundle_answer(session: ScoringSession, texts: Sequence[EvaluationText], index: int) -> Tensor:
    """Return the bundle's logits [positions, vocabulary] fp32 at the judged positions of text ``index``."""
    text = texts[index]
    return torch.from_numpy(session.logits(text.ids.numpy())[text.prefix - 1 : -1])


def shares_of(
    bundle: Bundle,
    original: Streamed,
    texts_each: int,
    session: ScoringSession,
    scratch: Path,
    progress: Progress,
    routes: Routes,
) -> tuple[Share, ...]:
    """Return what the linears, the head and embedding, and the runtime's arithmetic each add to the mean KL.

    The bundle's own weights are run in the reference's fp32 arithmetic: first only the linears of the blocks in the
    original's place, then the embedding and lm_head too; the exported graph itself is the last step. The experts that
    all the bundle's weights together choose are added to ``routes``.
    """
    recipe = bundle.manifest.recipe
    if recipe.linears is None or not texts_each:
        return ()
    reference, sample = original.reference, original.texts
    weights = BundleWeights(bundle.directory, reference.architecture)
    folded = Reference(reference.checkpoint.folded(bundle_folds(bundle.directory)), reference.architecture)

    def mean(answers: Answers) -> float:
        parts = compare(original, answers, progress, "Shares: comparing")
        return float(torch.cat([part.kl for part in parts]).double().mean())

    given = folded.exchanged(weights.dequantized)
    linears = reference_states(given, sample, scratch, progress, label="Shares: linears")
    only_linears = mean(lambda index: reference.logits(linears.states(index)))
    architecture = reference.architecture
    table, head = weights.quantized(architecture.embedding), weights.quantized(architecture.lm_head.weight)
    given = folded.exchanged(weights.dequantized, table.lookup if table else None)
    whole = reference_states(given, sample, scratch, progress, label="Shares: all weights", routes=routes)
    project = head.apply if head else reference.logits
    all_weights = mean(lambda index: project(whole.states(index)))
    shipped = mean(partial(bundle_answer, session, sample))
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
            kl_mean_nats=shipped - all_weights,
            note=f"the exported graph at accuracy_level {bundle.target.weights.accuracy_level}",
        ),
    )
