"""The account of a whole build, stage by stage, and the seconds that it takes on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping

import psutil

from glmexport.calibration.corpus import shipped_documents
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.foundation.work import Account, Range, Work, added
from glmexport.graph.caches import answers_together
from glmexport.quantization.account import TextSize, stages, walk_account
from glmexport.quantization.memory import MemoryPlan, plan_memory
from glmexport.validation.account import SHARED_STAGES, ValidationSize, validation_accounts
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.estimate import Planned, estimate
from glmexport.workflows.original import Original
from glmexport.workflows.unit_costs import UnitCosts

#: The share of the evaluation text that fidelity judges: from the first look alone to all of it.
FIDELITY_SHARE = Range(1 / 8, 1.0)
#: The tokens that the original computes for each token of the free answers.
ANSWER_PASSES = Range(1.0, 1.3)
#: Stages of the walk that one rank goes through for all.
_FIRST_RANK = {"write", "hash"}
#: Factor by which the account may be off in either direction: what it leaves out, and sizes that differ from those
#: that units are measured at.
_UNSURE = 1.15
#: Factor of the weights in fp32 that the whole model takes in memory, over the share of the free memory it may take.
_WHOLE = 4 * 1.25 / 0.8


def build_accounts(
    planned: Planned,
    text: TextSize | None,
    memory: MemoryPlan,
    validation: ValidationPlan,
    *,
    checkpoint_bytes: int,
    bundle_bytes: int,
    prefix: int = 0,
    ranks: int = 1,
) -> tuple[Account, Account]:
    """Return the least and the most work of every stage of a build and its validation.

    Args:
        planned: the bundle.
        text: the size of the calibration text; None: as the recipe plans it, with ``prefix`` tokens left out of each
            sequence.
        memory: the batches of the walk.
        validation: what is measured.
        checkpoint_bytes: the size of the checkpoint, which is hashed.
        bundle_bytes: the size of the bundle, which is written and hashed.
        prefix: the tokenizer's prefix.
        ranks: the ranks that share it; the account is of all of them together.
    """
    architecture, recipe = planned.architecture, planned.recipe
    if text is None and recipe.calibration:
        longest = min(architecture.context_length, architecture.attended_tokens or architecture.context_length)
        text = TextSize.planned(recipe.calibration, longest, prefix)
    walked = walk_account(architecture, recipe, planned.plan, text, memory)
    account: Account = {"hash": Work(hashed_bytes=checkpoint_bytes + bundle_bytes)}
    for stage in stages(walked):
        added(account, stage, walked[stage])
    added(account, "write", Work(written_bytes=bundle_bytes))
    weights = sum(math.prod(shape) for shape in architecture.shapes().values())
    whole = weights * _WHOLE < psutil.virtual_memory().available
    languages = len({document.language for document in shipped_documents("evaluation")})
    judged = Range(1.0, 1.0) if validation.full_text else FIDELITY_SHARE
    batches = answers_together(architecture, planned.target)
    size = ValidationSize(languages, judged, ANSWER_PASSES, batches, ranks)
    low, high = validation_accounts(architecture, planned.plan, validation, size, whole=whole)
    return account | low, account | high


def stage_seconds(
    accounts: tuple[Account, Account],
    quantizing: Mapping[str, Range],
    validating: Mapping[str, Range],
    ranks: int = 1,
) -> dict[str, Range]:
    """Return the wall seconds of every stage, where units cost so much while quantizing and while validating.

    Of several ``ranks``, whose accounts these are, each is that fast; they share the walk, and most of the validation.
    """
    low, high = accounts
    found = {}
    walked = {*stages(low)}
    for stage in low:
        costs = quantizing if stage in walked else validating
        shared = ranks if stage in SHARED_STAGES or (stage in walked and stage not in _FIRST_RANK) else 1
        least, most = low[stage].seconds(costs).low / shared, high[stage].seconds(costs).high / shared
        found[stage] = Range(least / _UNSURE, most * _UNSURE)
    return found


def build_seconds(
    original: Original,
    recipe: Recipe,
    target: Target,
    validation: ValidationPlan,
    quantizing: UnitCosts,
    validating: UnitCosts,
    limit_bytes: int | None,
    ranks: int = 1,
) -> dict[str, Range]:
    """Return the wall seconds of every stage of building ``original`` by ``recipe`` for ``target`` and validating it.

    ``ranks`` as for ``stage_seconds``.

    Raises:
        MachineError: it does not fit into ``limit_bytes`` of memory.
    """
    planned = original.planned(recipe, target)
    accounts = build_accounts(
        planned,
        None,
        plan_memory(planned.architecture, recipe, limit_bytes),
        validation,
        checkpoint_bytes=original.checkpoint.bytes,
        bundle_bytes=estimate(planned, limit_bytes).bundle_bytes,
        prefix=len(original.tokenizer.prefix),
        ranks=ranks,
    )
    return stage_seconds(accounts, quantizing.seconds, validating.seconds, ranks)


def total(seconds: Mapping[str, Range]) -> Range:
    """Return the sum over all stages."""
    return sum(seconds.values(), Range(0.0, 0.0))
