"""One plan says every matrix's format: what is refused, what is estimated and what is written agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import TINY, write_checkpoint

from glmexport.architecture.registry import FAMILIES
from glmexport.assembly.external import write_graphs
from glmexport.assembly.write import graphs_of
from glmexport.formats.plan import FormatPlan
from glmexport.foundation.definition import names
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import RECIPES, STORED, Format, Recipe, open_recipe
from glmexport.foundation.target import Target, shipped_targets
from glmexport.foundation.work import MEASURED_KINDS, Range
from glmexport.lowering.pipeline import lower
from glmexport.reference.reference import Reference
from glmexport.tuning.rounding import RoundedWeights
from glmexport.workflows.build import build
from glmexport.workflows.checks import refuse_formats
from glmexport.workflows.estimate import estimate
from glmexport.workflows.inspect import estimate_targets
from glmexport.workflows.job import Job, jobs_of, recipe_for
from glmexport.workflows.original import Original
from glmexport.workflows.unit_costs import UnitCosts
from glmexport.workflows.validate import BuildOptions

TARGETS = {target.name: target for target in shipped_targets()}
SHIPPED = [name for name in names(RECIPES) if name != STORED]
W4, W8 = Format(bits=4, group_size=128), Format(bits=8, group_size=128)
KINDS = [(family, False) for family in FAMILIES] + [("glm", True), ("glm4", True)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}{'-tied' if kind[1] else ''}")
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    family, tied = request.param
    return opened(tmp_path_factory.mktemp("checkpoint"), family, tie_word_embeddings=tied)


def opened(directory: Path, family: str, **changes: Any) -> Original:
    write_checkpoint(directory, family, **TINY[family], **changes)
    return Original.open(str(directory), Silent())


def refused(original: Original, recipe: Recipe, target: Target) -> str | None:
    try:
        refuse_formats(original, Job(target, recipe, Path()))
    except InputError as error:
        return error.message
    return None


@pytest.mark.parametrize("name", SHIPPED)
def test_inspect_says_what_a_build_refuses(name: str, original: Original, tmp_path: Path) -> None:
    """Whatever inspect shows as possible is not refused, and the other way round, in the same words."""
    costs = UnitCosts(dict.fromkeys(MEASURED_KINDS, Range(1e-9, 2e-9)), busy=False)
    for row in estimate_targets(original, name, None, costs):
        target = TARGETS[row.target]
        output = tmp_path / row.target
        if row.refused is None:
            # An output that exists is refused after every format was looked at, and before anything is read.
            output.mkdir()
            (output / "kept").touch()
        with pytest.raises(InputError) as caught:
            build(original, jobs_of(original, [target], name, output), BuildOptions(threads=1), Silent())
        expected = f"{output} exists." if row.refused is None else row.refused
        assert caught.value.message == expected


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_plan_that_is_not_refused_has_kernels(name: str, target: Target, original: Original) -> None:
    """And one that is refused for a format has that format somewhere."""
    recipe = recipe_for(original, name, target)
    plan = original.planned(recipe, target).plan
    offered, message = target.weights, refused(original, recipe, target)
    products = {form for key, form in plan.quantized().items() if key in plan.multiplied}
    # A budget may give any of its candidates to any product.
    products |= set(recipe.budget.candidates if recipe.budget else ())
    used = products | set(plan.quantized().values())
    without = {form for form in used if form.bits not in offered.bits or form.group_size not in offered.group_sizes}
    spelled = {form for form in products if not form.symmetric}
    if message is None:
        assert not without and not (offered.symmetric_only and spelled)
    elif "has no kernels" in message:
        assert any(f" {form.label}," in message for form in without)
    elif "with zero points" in message:
        assert any(f" {form.label} " in message for form in spelled)


@pytest.mark.parametrize("recipe", [None, "fp32", "w4g32-sym"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_estimate_is_what_is_written(
    recipe: str | None, target: Target, original: Original, tmp_path: Path
) -> None:
    """To the byte: tables, zero points that are spelled out, numbers in the type of the activations."""
    chosen = recipe_for(original, recipe, target)
    if refused(original, chosen, target):
        pytest.skip("is refused")
    planned = original.planned(chosen, target)
    architecture = planned.architecture
    weights = RoundedWeights(original.checkpoint, architecture, chosen, searched=False)
    assert all(weights.form(key) == form for key, form in planned.plan.formats.items())
    tables = Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length)
    graphs = {
        name: lower(graph, target, weights, tables) for name, graph in graphs_of(architecture, target.graph).items()
    }
    write_graphs(graphs, tmp_path, Silent(), None)
    written = sum(path.stat().st_size for path in (tmp_path / "weights").iterdir())
    assert estimate(planned, None).bundle_bytes == written


def test_attention_of_a_mixture_has_eight_bits(tmp_path: Path) -> None:
    """A target without the format of the experts' own neighbours is refused by the one that the estimate counts."""
    mixture = opened(tmp_path, "glm4_moe")
    recipe = open_recipe("w4g128")
    plan = FormatPlan.of(mixture.architecture, recipe)
    routed = mixture.architecture.routed
    linears = [linear for layer in mixture.architecture.layers for linear in layer.linears]
    assert {plan.form(linear.weight) for linear in linears if linear.weight in routed} == {W4}
    assert {plan.form(linear.weight) for linear in linears if linear.weight not in routed} == {W8}
    target = TARGETS["x86-avx2"]
    narrow = target.model_copy(update={"weights": target.weights.model_copy(update={"bits": (2, 4)})})
    assert "w8g" in str(refused(mixture, recipe.model_copy(update={"lm_head": W4, "embedding": W4}), narrow))
    assert "w8g" not in str(refused(mixture, recipe.model_copy(update={"shared": W4, "lm_head": W4, "embedding": W4}),
                                    narrow))


@pytest.mark.parametrize("name", ["qnn", "trt-rtx"])
def test_a_target_takes_its_own_default_recipe_for_one_table(name: str, tmp_path: Path) -> None:
    """The shape of GLM-Edge: one table that is embedding and lm_head, and a target without zero points."""
    edge = opened(tmp_path, "glm", tie_word_embeddings=True)
    target = TARGETS[name]
    recipe = recipe_for(edge, None, target)
    assert refused(edge, recipe, target) is None
    shipped = open_recipe(target.weights.default_recipe)
    plan = edge.planned(recipe, target).plan
    assert plan.form(edge.architecture.embedding) == plan.form(edge.architecture.lm_head.weight) == shipped.lm_head


def test_a_budget_changes_what_it_decided_and_nothing_else(tmp_path: Path) -> None:
    dense = opened(tmp_path, "glm4")
    plan = FormatPlan.of(dense.architecture, open_recipe("w4g128"))
    key = dense.architecture.layers[0].mlp.down.weight
    chosen = plan.chosen({key: W8})
    assert chosen.form(key) == W8
    assert {other for other in plan.formats if chosen.form(other) != plan.form(other)} == {key}


def test_what_is_no_matrix_has_no_format(tmp_path: Path) -> None:
    dense = opened(tmp_path, "glm4")
    plan = FormatPlan.of(dense.architecture, open_recipe("w4g128"))
    assert plan.form(dense.architecture.final_norm.weight) is None
    assert plan.looked_up == {dense.architecture.embedding}
    assert dense.architecture.embedding not in plan.multiplied
