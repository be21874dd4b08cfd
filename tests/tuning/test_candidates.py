"""Candidates are what the target and the architecture leave open, each once, and a target takes each of them on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from models import FAMILY, write_checkpoint

from glmexport.architecture.description import Architecture
from glmexport.foundation.evidence import CandidateSettings
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import Provider, Target, open_target
from glmexport.tuning.candidates import (
    SPINNING,
    Numerics,
    WantedValues,
    axes_of,
    candidates,
    identity,
    label,
    numerics,
    start_settings,
    with_settings,
)
from glmexport.workflows.original import Original

RECIPES = {name: open_recipe(name) for name in ("w4g32", "w4g128")}
#: A setting that is not tried by default.
ENTRY = "session.dynamic_block_base"


@pytest.fixture(scope="module")
def target() -> Target:
    return open_target("x86-avx2")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return described(tmp_path_factory.mktemp("glm4"))


def described(directory: Path, family: str = "glm4", **changes: Any) -> Architecture:
    write_checkpoint(directory, family, **changes)
    return Original.open(str(directory), Silent()).architecture


def test_every_combination_once_and_the_start_first(target: Target, architecture: Architecture) -> None:
    start = start_settings(target, "w4g32", 4)
    assert start == CandidateSettings(recipe="w4g32", accuracy_level=4, packed_qkv=True, threads=4)
    axes = axes_of(target, architecture, RECIPES, start, 4)
    every = candidates(start, axes)
    assert every[0] == start
    # Recipes, levels, fused or split, the cache in floats or int8, threads 4, 3, 2 and 1, spinning or not.
    assert len(every) == len({identity(each) for each in every}) == 2 * 2 * 2 * 2 * 4 * 2
    assert {each.threads for each in every} == {1, 2, 3, 4}
    # An entry with the runtime's default is the same as none.
    assert {each.session.get(SPINNING) for each in every} == {None, "0"}
    kinds = itertools.product(RECIPES, (0, 4), ("activations", "int8"))
    assert {numerics(each) for each in every} == {Numerics(*kind) for kind in kinds}


def test_caches_are_quantized_where_they_can_be(target: Target, architecture: Architecture, tmp_path: Path) -> None:
    def caches(target: Target, architecture: Architecture, recipe: str = "w4g32", **given: Any) -> tuple[str, ...]:
        start = start_settings(target, recipe, 1)
        return axes_of(target, architecture, {recipe: open_recipe(recipe)}, start, 1, WantedValues(**given)).kv_caches

    assert caches(target, architecture) == ("activations", "int8")
    assert caches(target, architecture, kv_caches=("int4",)) == ("activations", "int4")
    # Without calibration text there are no scales; latents have no form in codes.
    assert caches(target, architecture, "rtn-w4g32") == ("activations",)
    assert caches(target, described(tmp_path, "glm4_moe_lite", **FAMILY["glm4_moe_lite"])) == ("activations",)
    elsewhere = target.model_copy(update={"provider": Provider(name="CUDAExecutionProvider")})
    assert caches(elsewhere, architecture) == ("activations",)


def test_what_is_given_is_tried(target: Target, architecture: Architecture) -> None:
    start = start_settings(target, "w4g32", 2)
    options = {"num_streams": ("1", "2", "4")}
    axes = axes_of(
        target,
        architecture,
        {"w4g32": RECIPES["w4g32"]},
        start,
        2,
        WantedValues(threads=(7,), session={ENTRY: ("4", "8")}, provider=options),
    )
    every = candidates(start, axes)
    assert {each.threads for each in every} == {2, 7}
    assert {each.session.get(ENTRY) for each in every} == {None, "4", "8"}
    assert {each.provider.get("num_streams") for each in every} == {None, "1", "2", "4"}


def test_only_what_makes_a_difference(target: Target, tmp_path: Path) -> None:
    latent = described(tmp_path / "latent", "glm4_moe_lite", **FAMILY["glm4_moe_lite"])
    assert axes_of(target, latent, RECIPES, start_settings(target, "w4g32", 1), 1).packed_qkv == (True,)
    # Norms stand between the projections and the attention.
    normed = described(tmp_path / "normed", "glm4_moe", use_qk_norm=True, first_k_dense_replace=3)
    assert axes_of(target, normed, RECIPES, start_settings(target, "w4g32", 1), 1).packed_qkv == (True,)


def test_only_what_the_target_can(target: Target, architecture: Architecture) -> None:
    split = target.model_copy(update={"graph": target.graph.model_copy(update={"packed_qkv": False})})
    axes = axes_of(split, architecture, RECIPES, start_settings(split, "w4g32", 1), 1)
    assert axes.packed_qkv == (False,)
    other = target.model_copy(update={"provider": Provider(name="CUDAExecutionProvider")})
    axes = axes_of(other, architecture, RECIPES, start_settings(other, "w4g32", 1), 1)
    # Another provider has one arithmetic, and no pool of threads that spin.
    assert axes.accuracy_levels == (4,) and axes.session == {}
    whole = axes_of(target, architecture, {"fp32": open_recipe("fp32")}, start_settings(target, "fp32", 1), 1)
    assert whole.accuracy_levels == (4,)


def test_a_target_takes_on_a_candidate(target: Target) -> None:
    settings = CandidateSettings(
        recipe="w4g128", accuracy_level=0, packed_qkv=False, threads=3, session={SPINNING: "0"}, provider={"a": "b"}
    )
    tuned = with_settings(target, settings)
    assert tuned.weights.default_recipe == "w4g128" and tuned.weights.accuracy_level == 0
    assert not tuned.graph.packed_qkv and tuned.provider.options == {"a": "b"}
    assert (tuned.session.threads, tuned.session.config) == (3, {SPINNING: "0"})
    # And is a start that says the same.
    assert start_settings(tuned, "w4g128", 8) == settings
    assert tuned.gates == target.gates and tuned.probe == target.probe


def test_settings_are_equal_whatever_their_order() -> None:
    base = CandidateSettings(recipe="w4g32", accuracy_level=4, packed_qkv=True, threads=1)
    one, other = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert identity(base.model_copy(update={"session": one})) == identity(base.model_copy(update={"session": other}))
    assert identity(base) != identity(base.model_copy(update={"threads": 2}))


def test_a_label() -> None:
    settings = CandidateSettings(recipe="w4g32", accuracy_level=4, packed_qkv=True, threads=1, session={SPINNING: "0"})
    assert label(settings) == "w4g32, int8, fused QKV, 1 thread, allow_spinning=0"
