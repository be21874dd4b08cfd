"""What is dropped, what is on the front, and what is taken: pure functions on measurements."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.foundation.evidence import CandidateSettings, Deviation, Divergences, Gain, Gains
from glmexport.tuning.candidates import Numerics
from glmexport.tuning.pareto import Timed, better_half, contenders, front, pick, too_divergent


def divergences(
    original: float, arithmetic: float = 0.0, *, worst: float | None = None, upper: float | None = None
) -> Divergences:
    def deviation(mean: float, largest: float | None = None) -> Deviation:
        return Deviation(mean=mean, upper=upper, worst=mean if largest is None else largest, language="zh")

    return Divergences(original=deviation(original), arithmetic=deviation(arithmetic, worst), positions=100)


def timed(recipe: str, ratio: float, kl: float, *, spread: float = 0.01, threads: int = 1, level: int = 4) -> Timed:
    gain = Gain(ratio=ratio, lower=ratio - spread, upper=ratio + spread)
    settings = CandidateSettings.model_validate(
        {"recipe": recipe, "accuracy_level": level, "packed_qkv": True, "threads": threads}
    )
    gains = Gains(decode=gain, decode_long=gain, prefill=gain, preferred=gain, rounds=6)
    return Timed(settings, gains, divergences(kl))


START = divergences(0.005)


def test_arithmetic_within_the_allowance() -> None:
    assert too_divergent(divergences(0.006, 0.001), START, 0.01) is None
    reason = too_divergent(divergences(0.006, 0.001, worst=0.02), START, 0.01)
    assert reason is not None and "0.02 nats in zh" in reason and "allowance of 0.01" in reason
    # The worst language is within, but over all it is not sure.
    assert too_divergent(divergences(0.006, 0.001, upper=0.03), START, 0.01) is not None


def test_formats_within_the_allowance() -> None:
    assert too_divergent(divergences(0.0149), START, 0.01) is None
    reason = too_divergent(divergences(0.016), START, 0.01)
    assert reason is not None and "0.011 nats more" in reason
    # Less than the start is always right.
    assert too_divergent(divergences(0.0), START, 1e-9) is None


def test_the_gate_itself_holds_for_calibrated_weights_only() -> None:
    assert too_divergent(divergences(0.06), divergences(0.055), 0.01) is None
    reason = too_divergent(divergences(0.06), divergences(0.055), 0.01, calibrated_limit=0.05)
    assert reason is not None and "gate of 0.05" in reason


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_too_divergent(broken: float) -> None:
    assert too_divergent(divergences(0.005, broken), START, 1.0) is not None
    assert too_divergent(divergences(broken), START, 1.0) is not None


def test_the_better_half_of_every_class() -> None:
    one, other = Numerics("w4g32", 4), Numerics("w4g32", 0)
    speeds = {"a": (one, 1.0), "b": (one, 1.2), "c": (one, 0.9), "d": (other, 0.3), "e": (one, 0.2)}
    # Of four the two faster ones; the only one of its class stays, however slow.
    assert better_half(speeds) == ["a", "b", "d"]


def test_what_is_hopeless_goes_even_from_the_better_half() -> None:
    kind = Numerics("w4g32", 4)
    assert better_half({"a": (kind, 1.0), "b": (kind, 0.4), "c": (kind, 0.3)}) == ["a"]


@given(
    st.dictionaries(st.text(max_size=3), st.tuples(st.sampled_from([0, 4]), st.floats(0.1, 10)), min_size=1, max_size=9)
)
def test_the_fastest_of_every_class_goes_on(given_speeds: dict[str, tuple[int, float]]) -> None:
    speeds = {name: (Numerics("r", level), speed) for name, (level, speed) in given_speeds.items()}
    kept = better_half(speeds)
    for level in {kind.accuracy_level for kind, _ in speeds.values()}:
        fastest = max(speed for kind, speed in speeds.values() if kind.accuracy_level == level)
        assert any(speeds[name] == (Numerics("r", level), fastest) for name in kept)


def test_contenders_are_not_surely_beaten() -> None:
    fast, slow = timed("w4g128", 1.3, 0.007), timed("w4g128-sym", 1.1, 0.008)
    close, exact = timed("w4g64", 1.295, 0.0069), timed("w4g32", 0.9, 0.005)
    slower_in_class = timed("w4g128", 1.2, 0.007, threads=2)
    assert contenders([fast, slow, close, exact, slower_in_class]) == [fast, close, exact]
    # Without bounds nothing is sure.
    unsure = Timed(slow.settings, slow.gains.model_copy(update={"preferred": Gain(ratio=1.1)}), slow.divergence)
    assert contenders([fast, unsure]) == [fast, unsure]


def test_the_front() -> None:
    fast, middle, exact = timed("a", 1.3, 0.007), timed("b", 1.2, 0.006), timed("c", 0.9, 0.005)
    behind, same = timed("d", 1.1, 0.0065), timed("e", 1.3, 0.008)
    assert front([behind, exact, fast, same, middle]) == [fast, middle, exact]


@given(st.lists(st.tuples(st.floats(0.1, 3), st.floats(0, 1)), min_size=1, max_size=12))
def test_nothing_beats_the_front(points: list[tuple[float, float]]) -> None:
    every = [timed(f"r{index}", speed, kl) for index, (speed, kl) in enumerate(points)]
    best = front(every)
    for one in best:
        kl = one.divergence.original.mean
        assert not any(o.speed > one.speed and o.divergence.original.mean <= kl for o in every)
    for other in every:
        kl = other.divergence.original.mean
        assert any(one.speed >= other.speed and one.divergence.original.mean <= kl for one in best)


def test_the_fastest_is_taken() -> None:
    fast, slow = timed("a", 1.3, 0.007), timed("b", 1.2, 0.005)
    assert pick([slow, fast], start_is_legal=True) == fast


def test_the_least_divergent_of_those_that_cannot_be_told_apart() -> None:
    fast, near = timed("a", 1.30, 0.007, spread=0.05), timed("b", 1.27, 0.005)
    assert pick([fast, near], start_is_legal=True) == near
    # But not one that is itself not surely faster than the start.
    unsure = timed("c", 1.26, 0.001, spread=0.3)
    assert pick([fast, near, unsure], start_is_legal=True) == near


def test_the_start_stays_without_a_sure_gain() -> None:
    assert pick([], start_is_legal=True) is None
    assert pick([timed("a", 1.005, 0.001)], start_is_legal=True) is None
    assert pick([timed("a", 0.8, 0.001)], start_is_legal=True) is None


def test_where_the_start_is_not_legal_the_fastest_legal_one_is_taken() -> None:
    slow, slower = timed("a", 0.4, 0.005, level=0), timed("b", 0.3, 0.004, level=0)
    assert pick([slow, slower], start_is_legal=False) == slow
