"""The length of drafts, against the cheapest one of all and in simulated answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import MIXTURE, write_checkpoint

from benchmarks.drafting import simulate, whole_texts
from glmexport.foundation.progress import Silent
from glmexport.validation.behaviour.drafting import (
    PASS_TOKENS,
    DraftCost,
    DraftLengths,
    checked_tokens,
    gained_tokens,
    pass_tokens,
)
from glmexport.workflows.original import Original


def cost(count: int, refused: float, pass_cost: float) -> float:
    """The cost of a token of an answer, summed token by token."""
    gained = sum((1 - refused) ** place for place in range(count))
    return (pass_cost + count) / gained


@pytest.mark.parametrize("refused", [0.002, 0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("pass_cost", [0.3, 1.0, 4.0])
def test_no_length_is_much_cheaper(refused: float, pass_cost: float) -> None:
    chosen = cost(checked_tokens(refused, pass_cost), refused, pass_cost)
    best = min(cost(count, refused, pass_cost) for count in range(1, 1000))
    assert chosen <= 1.12 * best


@pytest.mark.parametrize("refused", [0.001, 0.01, 0.1])
def test_few_tokens_are_computed_in_vain_however_dear_a_pass_is(refused: float) -> None:
    count = checked_tokens(refused, 1e9)
    assert 1.2 < cost(count, refused, 0) < 1.3


def test_wrong_drafts_are_short() -> None:
    assert checked_tokens(0.9, 1e9) == 4
    assert checked_tokens(0.9, 0.1) == 1


def test_an_answer_s_own_share_counts_the_more_the_longer_it_is() -> None:
    lengths = DraftLengths(3)
    at_first = lengths.share(0)
    assert at_first == lengths.share(1) == 0.02
    for _ in range(30):
        lengths.see(0, 9, False)
        lengths.see(1, 9, True)
    assert lengths.share(0) < lengths.share(2) < lengths.share(1) < 0.1 + 1e-9
    assert lengths.checked(0, 3) > lengths.checked(1, 3)
    # Where few are left, a pass costs each of them more.
    assert lengths.checked(0, 1) > lengths.checked(0, 100)
    assert lengths.drafted(1, 100) >= 10 > lengths.checked(1, 100)


def test_a_pass_costs_more_tokens_where_each_passes_few_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "glm4")
    write_checkpoint(tmp_path / "mixture", "glm4_moe", **MIXTURE)
    dense, mixture = (Original.open(str(tmp_path / name), Silent()).architecture for name in ("dense", "mixture"))
    assert pass_tokens(dense) == PASS_TOKENS
    layers = [[linear.in_features * linear.out_features for linear in layer.linears] for layer in mixture.layers]
    routed = [
        sum(linear.in_features * linear.out_features for linear in layer.linears if linear.weight in layer.mlp.routed)
        for layer in mixture.layers
    ]
    whole, chosen = sum(map(sum, layers)), sum(routed) * 4 / 16
    assert pass_tokens(mixture) == pytest.approx(PASS_TOKENS * whole / (whole - sum(routed) + chosen))


@pytest.mark.parametrize("refused", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("answers", [20, 270])
def test_simulated_answers_compute_few_tokens_in_vain(refused: float, answers: int) -> None:
    """Even without the prompts, which are computed once."""
    sizes = {"answers": answers, "prompt": 1, "length": 64}
    found, before = simulate(refused, **sizes), whole_texts(refused, **sizes)
    assert found.computed <= 1.3 * found.needed
    assert found.cost < before.cost


def test_gained_tokens_are_those_agreed_with_and_the_next() -> None:
    assert gained_tokens(0.5, 1) == 1
    assert gained_tokens(0.5, 3) == 1 + 0.5 + 0.25


@pytest.mark.parametrize("batch", [0, 8])
@pytest.mark.parametrize("refused", [0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("shape", [(273, 54, 64), (31, 54, 64), (8, 54, 64), (2, 400, 256), (60, 400, 256)])
def test_drafting_anew_where_it_is_worth_it_is_no_dearer_than_always_or_never(
    shape: tuple[int, int, int], refused: float, batch: int
) -> None:
    answers, prompt, length = shape
    cost = DraftCost.by_bundle(batch)

    def found(again: bool | None) -> float:
        drawn = [
            simulate(refused, answers=answers, prompt=prompt, length=length, cost=cost, again=again, seed=seed).cost
            for seed in range(3)
        ]
        return sum(drawn)

    assert found(None) <= 1.1 * min(found(True), found(False))


def test_many_answers_go_on_without_drafts_and_few_with_them() -> None:
    lengths = DraftLengths(273, cost=DraftCost.by_bundle(8))
    assert not lengths.worthwhile(0, 273, 80, 32)
    assert lengths.worthwhile(0, 2, 80, 32)
    # What is known already costs nothing.
    assert DraftLengths(273).worthwhile(0, 273, 80, 32)
