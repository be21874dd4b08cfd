"""What is decided before the walk for all of its steps, and committed: scales to fold, and the formats of a budget."""

from __future__ import annotations

import time

from glmexport.architecture.description import Architecture
from glmexport.bundle.records import AllocatedGroup
from glmexport.checkpoint.fold import Fold, as_tensors, from_tensors
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format, Recipe
from glmexport.quantization.allocation import allocate, available_bits, tie_groups
from glmexport.quantization.folding import choose_folds
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.problem import LEAST_TOKENS
from glmexport.quantization.sensitivity import Probe, probe_ids
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.streams import Streams

FOLDS, ALLOCATION = "folds", "allocation"
#: Held-out tokens on which the channels of every tap are measured before scales are folded.
_FOLD_TOKENS = 4096


def decide_folds(streams: Streams, form: Format, memory: MemoryPlan, progress: Progress) -> dict[str, Fold]:
    """Scales to move between tensors of linears that are stored as ``form``: chosen once, then read back.

    None on text that is too poor for anything to be fitted to it.
    """
    work, calibration, architecture = streams.work, streams.calibration, streams.reference.architecture
    widest = max(linear.in_features for _, linear in architecture.linears)
    if calibration.effective_tokens < LEAST_TOKENS * widest:
        return {}
    if work.record(FOLDS) is None:
        started = time.monotonic()
        ids = probe_ids(calibration, _FOLD_TOKENS)
        folds = choose_folds(streams.reference, ids, calibration.prefix, form, memory.batch_tokens, progress)
        work.commit(FOLDS, {}, {"seconds": time.monotonic() - started}, tensors=as_tensors(folds))
    folds = from_tensors(work.tensors(FOLDS))
    columns = {key for key, fold in folds.items() if fold.columns is not None}
    if columns:
        progress.remark(f"Scales are folded into the input channels of {len(columns)} linears.")
    return folds


def decide_formats(streams: Streams, recipe: Recipe, memory: MemoryPlan, progress: Progress) -> dict[str, Format]:
    """Format of every matrix under the recipe's budget, by weight key: measured and chosen once, then read back."""
    assert recipe.budget is not None
    work, calibration, architecture = streams.work, streams.calibration, streams.reference.architecture
    groups = list(tie_groups(architecture, recipe))
    if work.record(ALLOCATION) is None:
        started = time.monotonic()
        ids = probe_ids(calibration, recipe.budget.probe_tokens)
        probe = Probe(streams.reference, ids, calibration.prefix, groups, work, memory)
        losses = probe.losses(progress)
        bits = [[group.bits(form) for form in group.candidates] for group in groups]
        chosen = allocate(losses, bits, available_bits(architecture, recipe))
        note = {"chosen": chosen, "losses": losses, "seconds": time.monotonic() - started}
        work.commit(ALLOCATION, {}, note)
        probe.forget()
    return {key: group.format for group in allocated_groups(work, architecture, recipe) for key in group.keys}


def allocated_groups(work: WorkDirectory, architecture: Architecture, recipe: Recipe) -> tuple[AllocatedGroup, ...]:
    """What the budget's bits were given to, in the order of the model; nothing if that was not decided."""
    record = work.record(ALLOCATION)
    if record is None:
        return ()
    groups = tie_groups(architecture, recipe)
    return tuple(
        AllocatedGroup(
            name=group.name,
            keys=tuple(group.shapes),
            format=group.candidates[choice],
            bits=group.bits(group.candidates[choice]),
            loss_nats=losses[choice],
            tried=choice in group.tried,
        )
        for group, choice, losses in zip(groups, record["note"]["chosen"], record["note"]["losses"], strict=True)
    )
