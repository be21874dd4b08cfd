"""What was lost in the answers: chances and bounds by hand, and gates that block only what is proven."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from glmexport.foundation.target import BehaviourLimits, Gates
from glmexport.results.behaviour import Behaviour, LanguageBehaviour, TaskGroup
from glmexport.results.fidelity import Fidelity
from glmexport.results.gate import Gate
from glmexport.results.paired import Paired
from glmexport.results.record import Verdict
from glmexport.validation.behaviour.paired import compare_paired, loss_chance
from glmexport.validation.gates import apply_gates
from glmexport.validation.losses import Loss, losses

LIMITS = BehaviourLimits(length_ratio=0.1, answers=0.1, chrf=0.03, tasks=0.05)
POLICY = Gates(kl_mean_nats=1, ln_perplexity_ratio=1, top1_agreement=0.5, minimum_positions=1, behaviour=LIMITS)
SAME = compare_paired([1] * 200, [1] * 200)


def lost(tasks: int, count: int, gained: int = 0) -> Paired:
    """``count`` of so many tasks lost, and ``gained`` others."""
    return compare_paired([1] * (tasks - gained) + [0] * gained, [0] * count + [1] * (tasks - count))


def behaviour(
    answers: int = 200, ratio: float = 0.0, error: float = 0.0, tasks: tuple[TaskGroup, ...] = (), **changes: Paired
) -> Behaviour:
    overall = LanguageBehaviour.model_construct(answers=answers, tokens_original=answers * 10)
    optional: dict[str, Paired | None] = dict.fromkeys(["drift", "tool_calls", "tool_calls_together", "translation"])
    return Behaviour.model_construct(
        overall=overall, ln_length_ratio=ratio, ln_length_ratio_error=error, tasks=tasks,
        **({"loops": SAME, "ended": SAME} | optional | changes),
    )  # fmt: skip


def first(found: Behaviour, name: str) -> Loss:
    (loss,) = (loss for loss in losses(found, LIMITS, 0.95) if loss.name.startswith(name))
    return loss


def gate(found: Behaviour, name: str) -> Gate:
    gates = apply_gates(Fidelity.model_construct(languages=()), POLICY, found)
    (only,) = (gate for gate in gates if gate.name.startswith(name))
    return only


def test_every_loss_has_its_limit() -> None:
    group = TaskGroup(name="sums", metric="exact", original=1, bundle=1, change=SAME)
    whole = behaviour(drift=SAME, tool_calls=SAME, tool_calls_together=SAME, translation=SAME, tasks=(group,))
    assert [(loss.name, loss.limit) for loss in losses(whole, LIMITS, 0.95)] == [
        ("ln of lengths of answers, bundle / original", math.log1p(0.1)),
        ("More answers that end in a loop", 0.1),
        ("More answers that do not end", 0.1),
        ("Answers in another language", 0.1),
        ("Tool calls lost", 0.1),
        ("Tool calls lost in a batch", 0.1),
        ("chrF of translations lost", 0.03),
        ("Score lost in sums (exact)", 0.05),
    ]
    assert len(list(losses(behaviour(), LIMITS, 0.95))) == 3


@pytest.mark.parametrize("direction", [1, -1])
def test_lengths_by_hand(direction: int) -> None:
    """ln 1.2 of 61 answers with an error of 0.03: 1.671 errors either way, and above ln 1.1 by 2.9."""
    loss = first(behaviour(61, direction * math.log(1.2), 0.03), "ln of lengths")
    assert loss.value == pytest.approx(math.log(1.2))
    assert (loss.lower, loss.upper) == pytest.approx((math.log(1.2) - 0.0501, math.log(1.2) + 0.0501), abs=1e-4)
    distance = (math.log(1.2) - math.log(1.1)) / 0.03
    assert loss.p_value == pytest.approx(stats.t.sf(distance, 60), rel=1e-6)
    assert loss.sample == "61 answers, 610 tokens of the original"


def test_lengths_that_may_be_the_same() -> None:
    loss = first(behaviour(61, -0.01, 0.03), "ln of lengths")
    assert (loss.lower, loss.upper) == pytest.approx((0, 0.01 + 0.0501), abs=1e-4)
    assert 0.99 < loss.p_value <= 1


def test_one_answer_says_nothing_of_lengths() -> None:
    loss = first(behaviour(1, math.log(5), math.inf), "ln of lengths")
    assert (loss.lower, loss.upper, loss.p_value) == (0, math.inf, 1)


def test_shares_are_turned_into_losses() -> None:
    change = lost(40, 6, 1)
    loss = first(behaviour(ended=change), "More answers that do not end")
    assert loss.value == pytest.approx(5 / 40)
    assert (loss.lower, loss.upper) == (-change.upper_bound, -change.lower_bound)
    assert loss.sample == "40 answers, 6 lost and 1 gained"
    assert loss.p_value == loss_chance(change, 0.1)


def worse_or_equal(tasks: int, count: int, share_lost: float) -> float:
    """Chance of so many lost where none is gained."""
    return float(stats.binom.sf(count - 1, tasks, share_lost))


@pytest.mark.parametrize(("tasks", "count"), [(2, 2), (6, 6), (20, 8), (100, 25), (300, 60)])
def test_the_chance_of_a_loss_is_no_smaller_than_that_of_the_simplest_case(tasks: int, count: int) -> None:
    """Nothing gained is one of the ways in which the true loss can be the limit."""
    assert loss_chance(lost(tasks, count), 0.1) >= worse_or_equal(tasks, count, 0.1)


@pytest.mark.parametrize("tasks", [4, 9, 14])
def test_true_losses_at_the_limit_are_rarely_rejected(tasks: int) -> None:
    """The chance is below alpha in at most alpha of all results, whatever is gained and lost at the limit."""
    results = [(down, up) for down in range(tasks + 1) for up in range(tasks + 1 - down)]
    found = {result: loss_chance(lost(tasks, *result), 0.1) for result in results}
    for gained in (0, 0.01, 0.05, 0.2, 0.4):
        chances = stats.multinomial.pmf(
            [(down, up, tasks - down - up) for down, up in results], tasks, [gained + 0.1, gained, 0.9 - 2 * gained]
        )
        for alpha in (0.05, 0.01, 0.001):
            rejected = sum(p for p, result in zip(chances, results, strict=True) if found[result] <= alpha)
            assert rejected <= alpha + 1e-9, (gained, alpha)


def test_scores_between_are_students() -> None:
    before, after = [0.5, 0.6, 0.7, 0.4], [0.4, 0.55, 0.5, 0.35]
    change = compare_paired(before, after)
    test = stats.ttest_1samp([b - a for b, a in zip(before, after, strict=True)], 0.03, alternative="greater")
    assert loss_chance(change, 0.03) == pytest.approx(test.pvalue)


def test_losses_that_are_all_alike_are_as_rare_as_what_was_not_seen() -> None:
    change = compare_paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    assert change.standard_error == 0
    # Bound and chance meet: at a confidence of 1 - p the lower bound of the loss is the limit.
    chance = loss_chance(change, 0.03)
    assert chance == pytest.approx(0.93**3)
    again = compare_paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], confidence=1 - chance)
    assert -again.upper_bound == pytest.approx(0.03)
    assert loss_chance(change, 0.2) == 1


def test_one_score_says_nothing() -> None:
    assert loss_chance(compare_paired([0.9], [0.1]), 0.03) == 1


SCORES = st.sampled_from([0, 1]) | st.floats(0, 1)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 0, 1])), min_size=1, max_size=30)
    | st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=30),
    st.sampled_from([0.02, 0.1, 0.4]),
)
def test_what_is_too_rare_is_beyond_the_bound(pairs: list[tuple[float, float]], limit: float) -> None:
    before, after = (list(side) for side in zip(*pairs, strict=True))
    change = compare_paired(before, after)
    if loss_chance(change, limit) < 0.045:
        assert -change.upper_bound > limit - 1e-4
    if -change.upper_bound <= limit - 1e-4:
        assert loss_chance(change, limit) >= 0.045


def test_few_losses_are_inconclusive_and_not_a_block() -> None:
    """Two of two lost are no proof of a tenth, however alike they are."""
    for change in (lost(1, 1), lost(2, 2), lost(3, 3)):
        judged = gate(behaviour(tool_calls=change), "Tool calls lost")
        assert judged.verdict is Verdict.INCONCLUSIVE and judged.value == 1


def test_much_that_is_lost_blocks() -> None:
    judged = gate(behaviour(ended=lost(200, 80)), "More answers that do not end")
    assert judged.verdict is Verdict.BLOCK
    assert judged.lower is not None and judged.lower > judged.limit
    translated = compare_paired([0.5 + i / 1000 for i in range(60)], [0.3 + i / 990 for i in range(60)])
    assert gate(behaviour(translation=translated), "chrF").verdict is Verdict.BLOCK
    assert gate(behaviour(ratio=1.0, error=0.05), "ln of lengths").verdict is Verdict.BLOCK
    assert gate(behaviour(ratio=-1.0, error=0.05), "ln of lengths").verdict is Verdict.BLOCK


def test_verdicts_between() -> None:
    assert gate(behaviour(), "More answers that end in a loop").verdict is Verdict.PASS
    # Nothing lost, of too few.
    assert gate(behaviour(loops=lost(10, 0)), "More answers that end in a loop").verdict is Verdict.INCONCLUSIVE
    # The value is above the limit, and not surely.
    assert gate(behaviour(loops=lost(30, 4)), "More answers that end in a loop").verdict is Verdict.INCONCLUSIVE
    # Surely above three quarters of the limit, and surely below it.
    assert gate(behaviour(loops=lost(6000, 528)), "More answers that end in a loop").verdict is Verdict.WARN
    # Something gained is no loss.
    assert gate(behaviour(loops=lost(200, 0, 100)), "More answers that end in a loop").verdict is Verdict.PASS


@pytest.mark.parametrize(("tasks", "count"), list(itertools.product([1, 3, 10, 40, 150], [0, 1, 3, 10, 40])))
def test_the_verdict_never_contradicts_the_bounds(tasks: int, count: int) -> None:
    if count <= tasks:
        judged = gate(behaviour(ended=lost(tasks, count)), "More answers that do not end")
        assert judged.lower is not None and judged.upper is not None
        assert judged.verdict is not Verdict.BLOCK or judged.lower > judged.limit
        assert (judged.verdict in (Verdict.PASS, Verdict.WARN)) == (judged.upper <= judged.limit)


def test_how_many_tasks_would_decide() -> None:
    """Without a single change it takes 59 to show that fewer than 5 % are lost, at 95 %: 0.95^59 < 0.05."""
    group = TaskGroup(name="sums", metric="exact", original=1, bundle=1, change=compare_paired([1] * 20, [1] * 20))
    found = gate(behaviour(tasks=(group,)), "Score lost")
    assert (found.verdict, found.documents_needed, found.needed_unit) == (Verdict.INCONCLUSIVE, 59, "tasks")
    # One of 50 lost: 0.02 with an error of 0.02, 0.03 below the limit.
    some = first(behaviour(tasks=(group.model_copy(update={"change": lost(50, 1)}),)), "Score lost")
    quantiles = stats.t.ppf(0.95, 130) + stats.t.ppf(0.8, 130)
    assert some.needed == pytest.approx((0.02 * math.sqrt(50) / 0.03 * quantiles) ** 2, rel=0.05)
    sure = gate(behaviour(), "More answers that end in a loop")
    assert sure.verdict is Verdict.PASS and sure.documents_needed is None
