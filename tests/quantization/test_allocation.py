"""Formats under a budget: exact against every possibility, never over the limit, and refused when nothing fits."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RECIPE, Model

from glmexport.formats.codecs import stored_bits
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import Budget, Format, Recipe
from glmexport.quantization.allocation import (
    allocate,
    available_bits,
    relaxed,
    require_fit,
    spared_stdout,
    tie_groups,
)
from glmexport.quantization.decisions import ALLOCATION

CANDIDATES = (
    Format(bits=2, group_size=32),
    Format(bits=4, group_size=64),
    Format(bits=4, group_size=32),
    Format(bits=8, group_size=32),
)


def mixed(bits_per_weight: float) -> Recipe:
    budget = Budget(bits_per_weight=bits_per_weight, candidates=CANDIDATES, probe_tokens=256)
    return RECIPE.model_copy(update={"budget": budget})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


def test_allocation_by_hand() -> None:
    """The second group loses more at 2 bits than the first, and one of them can have 4."""
    assert allocate([[5.0, 1.0], [9.0, 1.0]], [[20, 40], [20, 40]], 60) == [0, 1]
    assert allocate([[5.0, 1.0], [9.0, 1.0]], [[20, 40], [20, 40]], 80) == [1, 1]
    assert allocate([[5.0, 1.0], [9.0, 1.0]], [[20, 40], [20, 40]], 59) == [0, 0]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_allocation_against_every_possibility(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 4))
    losses = [[data.draw(st.integers(0, 1000)) / 1e5 for _ in range(count)] for _ in range(groups)]
    bits = [[data.draw(st.integers(1, 60)) * 1000 for _ in range(count)] for _ in range(groups)]
    available = data.draw(st.integers(sum(map(min, bits)), sum(map(max, bits))))

    def sums(choice: tuple[int, ...] | list[int]) -> tuple[int, float]:
        return (
            sum(row[at] for row, at in zip(bits, choice, strict=True)),
            sum(row[at] for row, at in zip(losses, choice, strict=True)),
        )

    fitting = [sums(choice)[1] for choice in product(range(count), repeat=groups) if sums(choice)[0] <= available]
    size, loss = sums(allocate(losses, bits, available))
    assert size <= available
    assert loss == pytest.approx(min(fitting), abs=1e-9)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_many_groups_lose_hardly_more_than_by_the_exact_choice(share: float) -> None:
    chance = np.random.default_rng(3)
    scale = chance.lognormal(0, 1.5, 240)
    losses = [[float(each * error * chance.lognormal(0, 0.1)) for error in (1, 0.09, 0.07, 5e-4)] for each in scale]
    bits = [[int(size * per) for per in (100, 140, 160, 290)] for size in chance.integers(10, 40, 240)]
    least, most = sum(map(min, bits)), sum(map(max, bits))
    available = int(least + share * (most - least))
    exact, near = allocate(losses, bits, available), relaxed(losses, bits, available)
    size, loss = (sum(row[at] for row, at in zip(rows, near, strict=True)) for rows in (bits, losses))
    assert available - min(100 * 10, available) < size <= available
    assert loss <= 1.002 * sum(row[at] for row, at in zip(losses, exact, strict=True))
    # Groups of other numbers of candidates, and a limit that leaves no choice.
    assert relaxed([[5.0, 1.0], [9.0]], [[20, 40], [20]], 60) == [1, 0]
    assert relaxed([[5.0, 1.0], [9.0, 1.0]], [[20, 40], [20, 40]], 40) == [0, 0]


def test_what_c_code_prints_is_not_the_document(capfd: pytest.CaptureFixture[str]) -> None:
    with spared_stdout():
        ctypes.CDLL(None).puts(b"from within a library")
        os.write(1, b"at once\n")
    print("the document", flush=True)
    assert capfd.readouterr().out == "the document\n"


def test_a_budget_that_nothing_fits_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="no choice of candidates"):
        allocate([[1.0, 0.0]], [[16, 32]], 15)
    require_fit(model.architecture, mixed(4.5))
    with pytest.raises(InputError, match="smallest formats need") as refused:
        require_fit(model.architecture, mixed(2.0))
    assert "--bpw" in refused.value.next_step


def test_groups_are_what_the_runtime_stores_together(model: Model) -> None:
    groups = list(tie_groups(model.architecture, mixed(4.5)))
    assert [group.name for group in groups][:3] == ["embedding", "block 0 qkv", "block 0 o"]
    assert len(groups) == 2 + 4 * len(model.architecture.layers)
    assert {key for group in groups for key in group.shapes} == model.matrices()


def test_one_format_of_each_number_of_bits_is_tried(model: Model) -> None:
    group = next(iter(tie_groups(model.architecture, mixed(4.5))))
    assert group.candidates == CANDIDATES
    assert group.tried == {0: (), 2: (1,), 3: ()}
    forms = (Format(bits=4, group_size=32, symmetric=True), Format(bits=4, group_size=32))
    assert replace(group, candidates=forms).tried == {0: (), 1: ()}


def test_a_mixed_walk_keeps_within_its_budget_and_resumes(model: Model, tmp_path: Path) -> None:
    recipe = mixed(7.0)
    shapes = model.architecture.shapes()
    whole = model.walked(tmp_path / "whole", recipe)
    weights = whole.weights()
    bits = {key: stored_bits(shape, weights.form(key)) for key, shape in shapes.items()}
    quantized = sum(bits[key] for key in model.matrices())
    available = available_bits(model.architecture, recipe)
    assert 0.9 * available < quantized <= available
    assert sum(bits.values()) / sum(int(torch.tensor(shape).prod()) for shape in shapes.values()) <= 7.0
    for layer in model.architecture.layers:
        for linears in layer.taps.values():
            assert len({weights.form(linear.weight) for linear in linears}) == 1
    told = whole.allocation
    record = whole.job.work.record(ALLOCATION)
    assert record is not None
    assert {key for group in told for key in group.keys} == model.matrices()
    assert sum(group.bits for group in told) == quantized
    for group, chosen, losses in zip(told, record["note"]["chosen"], record["note"]["losses"], strict=True):
        assert {weights.form(key) for key in group.keys} == {group.format}
        assert group.loss_nats == losses[chosen]
        assert group.tried == (group.format.group_size == 32)
    assert not list(whole.job.work.path.glob("sensitivity_*"))
    killed = model.walk(tmp_path / "killed", recipe)
    killed.take_step(0)
    chosen = killed.job.work.record(ALLOCATION)
    second = model.walked(tmp_path / "killed", recipe)
    assert second.job.work.record(ALLOCATION) == chosen
    for step in whole.parts:
        assert second.job.work.formats(step) == whole.job.work.formats(step)
        for key in whole.job.work.formats(step):
            assert torch.equal(second.job.work.packed(step, key, "codes"), whole.job.work.packed(step, key, "codes"))
