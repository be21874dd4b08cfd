"""What is offered can be built: every target's default recipe for every family that the target can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import TINY, write_checkpoint, write_predicting

from glmexport.architecture.registry import FAMILIES
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import Target, shipped_targets
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import Job, budget_of, jobs_of, recipe_for
from glmexport.workflows.original import Original

#: What a target cannot run at all, whatever the formats are.
CANNOT_RUN = ("selects what it attends to", "mixture of experts", "latent attention, which is lowered")
TARGETS = {target.name: target for target in shipped_targets()}


@pytest.fixture(scope="module", params=[(family, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    family, tied = request.param
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family, **TINY[family], tie_word_embeddings=tied)
    opened = Original.open(str(directory), Silent())
    assert opened.architecture.tied is tied
    return opened


@pytest.mark.parametrize("name", TARGETS)
def test_the_default_recipe_of_a_target_is_refused_for_no_family_that_it_can_run(name: str, original: Original) -> None:
    target = TARGETS[name]
    recipe = recipe_for(original, None, target)
    try:
        refuse_formats(original, Job(target, recipe, Path()))
    except InputError as error:
        assert any(reason in error.message for reason in CANNOT_RUN), error.message
        return
    planned = original.planned(recipe, target)
    architecture, plan = planned.architecture, planned.plan
    used = {form for key, form in plan.quantized().items() if key in plan.multiplied}
    assert used
    assert not target.weights.symmetric_only or all(form.symmetric for form in used)
    assert architecture.token_prediction is None
    if target.graph.activations != "float32":
        # What is in full precision is half as large (tests/formats/test_plan.py).
        return
    # The estimate is of the same formats.
    bits = plan.bits(architecture.shapes())
    assert estimate(planned, None).bundle_bytes == bits // 8 + architecture.rotary_bytes


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.graph.static_shapes])
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_budget_for_a_target_chooses_among_formats_that_it_takes(name: str, family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family], tie_word_embeddings=True)
    opened = Original.open(str(tmp_path), Silent())
    (job,) = jobs_of(opened, [TARGETS[name]], None, tmp_path / "out", budget_of(None, 6.0))
    assert job.recipe.budget is not None and job.recipe.budget.candidates
    refuse_formats(opened, job)


def tied_and_apart(directory: Path) -> tuple[Original, Original]:
    write_checkpoint(directory / "tied", "glm", **TINY["glm"], tie_word_embeddings=True)
    write_checkpoint(directory / "apart", "glm", **TINY["glm"])
    tied, apart = (Original.open(str(directory / name), Silent()) for name in ("tied", "apart"))
    return tied, apart


@pytest.mark.parametrize("name", ["qnn", "trt-rtx"])
def test_one_table_has_the_format_of_the_head_where_products_have_no_zero_points(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    tied, apart = tied_and_apart(tmp_path)
    shipped = open_recipe(target.weights.default_recipe)
    assert shipped.embedding is not None and not shipped.embedding.symmetric
    assert recipe_for(apart, None, target) == shipped
    recipe = recipe_for(tied, None, target)
    assert FormatPlan.of(tied.architecture, recipe).form(tied.architecture.embedding) == shipped.lm_head
    # Where zero points have a place nothing changes.
    assert recipe_for(tied, target.weights.default_recipe, TARGETS["x86-avx2"]) == shipped
    with pytest.raises(InputError, match="with zero points"):
        refuse_formats(tied, Job(target, open_recipe("w4g32"), Path()))


def sized(target: Target, **memory: Any) -> Target:
    return target.model_copy(update={"memory": target.memory.model_copy(update=memory)})


def test_a_tensor_that_is_too_large_is_so_in_the_format_that_it_has(tmp_path: Path) -> None:
    """Not in that of the lm_head, which a table that is both has not, nor in that of other linears."""
    tied, apart = tied_and_apart(tmp_path)
    recipe = open_recipe("w4g32")
    assert recipe.lm_head is not None
    recipe = recipe.model_copy(update={"embedding": recipe.linears})
    # The largest linear takes 32,768 bytes, the table 16,896 in 4 bits and 33,792 in 8.
    target = sized(TARGETS["x86-avx2"], max_tensor_bytes=33_000)
    refuse_formats(tied, Job(target, recipe, Path()))
    with pytest.raises(InputError, match=r"lm_head\.weight takes"):
        refuse_formats(apart, Job(target, recipe, Path()))


def test_a_format_that_no_matrix_has_is_no_reason_to_refuse(tmp_path: Path) -> None:
    tied, apart = tied_and_apart(tmp_path)
    recipe = open_recipe("w4g32-sym-head")
    assert recipe.lm_head is not None
    recipe = recipe.model_copy(
        update={"embedding": recipe.lm_head, "lm_head": recipe.lm_head.model_copy(update={"symmetric": False})}
    )
    refuse_formats(tied, Job(TARGETS["qnn"], recipe, Path()))
    with pytest.raises(InputError, match="with zero points"):
        refuse_formats(apart, Job(TARGETS["qnn"], recipe, Path()))


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_lite", "glm_moe_dsa"])
def test_what_drafts_is_planned_with_the_rest(family: str, tmp_path: Path) -> None:
    write_predicting(tmp_path, family, **TINY[family])
    original = Original.open(str(tmp_path), Silent())
    draft = original.architecture.token_prediction
    assert draft is not None
    plan = FormatPlan.of(original.architecture, open_recipe("w4g32"))
    assert {linear.weight for linear in draft.matrices} <= set(plan.formats)
