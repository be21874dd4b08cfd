"""The decisions that hold for all steps of a walk, committed before it: scales to fold, formats under a budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from glmexport.architecture.description import Architecture
from glmexport.bundle.records import AllocatedGroup
from glmexport.checkpoint.fold import as_tensors, from_tensors
from glmexport.foundation.recipe import Format, Recipe
from glmexport.quantization.allocation import allocate, allowed_candidates, available_bits, tie_groups
from glmexport.quantization.folding import choose_folds
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.problem import LEAST_TOKENS
from glmexport.quantization.sensitivity import Probe, probe_ids
from glmexport.quantization.store import WorkDirectory

FOLDS, ALLOCATION = "folds", "allocation"
_Number = TypeVar("_Number", int, float)
#: Number of held-out tokens on which the channels of every tap are measured before scales are folded.
FOLD_TOKENS = 4096


def decide_folds(job: QuantizationJob) -> QuantizationJob:
    """Return ``job`` with scales moved between tensors of its checkpoint: chosen once, then read back.

    Rank 0 does it for all, as it is short beside the walk. Nothing is moved where the recipe does not ask for it, or
    where the text is too poor to fit anything to it.
    """
    work, calibration, architecture, recipe = job.work, job.calibration, job.architecture, job.recipe
    if calibration is None or recipe.linears is None or not recipe.solver.fold_scales:
        return job
    widest = max(linear.in_features for _, linear in architecture.linears)
    if calibration.effective_tokens < LEAST_TOKENS * widest:
        return job
    if job.ranks.first and work.record(FOLDS) is None:
        form = recipe.linear(mixture=bool(architecture.routed), routed=False)
        assert form is not None
        started = time.monotonic()
        ids = probe_ids(calibration, FOLD_TOKENS)
        chosen = choose_folds(job.reference(), ids, calibration.prefix, form, job.memory.batch_tokens, job.progress)
        work.commit(FOLDS, {}, {"seconds": time.monotonic() - started}, tensors=as_tensors(chosen))
    job.ranks.barrier()
    folds = from_tensors(work.tensors(FOLDS))
    columns = {key for key, fold in folds.items() if fold.columns is not None}
    if columns:
        job.progress.remark(f"Scales are folded into the input channels of {len(columns)} linears.")
    return replace(job, checkpoint=job.checkpoint.folded(folds))


def decide_formats(job: QuantizationJob) -> dict[str, Format]:
    """Return the format of every matrix under the recipe's budget, by weight key; nothing without a budget.

    The formats are measured and chosen once, then read back.
    """
    work, calibration, architecture, recipe = job.work, job.calibration, job.architecture, job.recipe
    if calibration is None or recipe.budget is None:
        return {}
    groups = list(tie_groups(architecture, recipe))
    if job.ranks.first and work.record(ALLOCATION) is None:
        started = time.monotonic()
        ids = probe_ids(calibration, recipe.budget.probe_tokens)
        probe = Probe(job.reference(), ids, calibration.prefix, groups, work, job.memory)
        losses = probe.losses(job.progress)
        available = available_bits(architecture, recipe)
        allowed = allowed_candidates(groups, available)
        bits = [[group.bits(form) for form in group.candidates] for group in groups]
        picked = allocate(_of_allowed(losses, allowed), _of_allowed(bits, allowed), available)
        chosen = [some[index] for some, index in zip(allowed, picked, strict=True)]
        note = {"chosen": chosen, "losses": losses, "cold": probe.cold, "seconds": time.monotonic() - started}
        work.commit(ALLOCATION, {}, note)
        probe.forget()
    job.ranks.barrier()
    return {key: group.format for group in allocated_groups(work, architecture, recipe) for key in group.keys}


def allocated_groups(work: WorkDirectory, architecture: Architecture, recipe: Recipe) -> tuple[AllocatedGroup, ...]:
    """Return the groups that the budget's bits were given to, in the order of the model; none if none were decided."""
    record = work.record(ALLOCATION)
    if record is None:
        return ()
    groups, note = tie_groups(architecture, recipe), record["note"]
    cold = set(note.get("cold", []))
    return tuple(
        AllocatedGroup(
            name=group.name,
            keys=tuple(group.shapes),
            format=group.candidates[choice],
            bits=group.bits(group.candidates[choice]),
            loss_nats=losses[choice],
            tried=choice in group.tried and group.expert_part is None,
            expert_part=group.expert_part,
            cold=number in cold,
        )
        for number, (group, choice, losses) in enumerate(zip(groups, note["chosen"], note["losses"], strict=True))
    )


def _of_allowed(rows: Sequence[Sequence[_Number]], allowed: Sequence[Sequence[int]]) -> list[list[_Number]]:
    """Return of each of ``rows`` [groups][candidates] what is of its ``allowed`` candidates."""
    return [[row[index] for index in some] for row, some in zip(rows, allowed, strict=True)]
