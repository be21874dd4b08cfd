"""Sides take turns, and what they took becomes ratios with bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builds import THREADS, Sample

from glmexport.architecture.description import Architecture
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent
from glmexport.tuning import measure
from glmexport.tuning.measure import Side, Times, Workload, as_numbers, from_numbers, gains_of, take_pairs
from glmexport.tuning.slices import Slices
from glmexport.workflows.original import Original

WORKLOAD = Workload(prompt=tuple(range(10)), short=3, generated=4)


class Played:
    """A side whose seconds are known; notes its turns."""

    def __init__(self, name: str, times: Times, turns: list[str]) -> None:
        self.name, self.times, self.turns = name, times, turns

    def take(self) -> Times:
        self.turns.append(self.name)
        return self.times


def played(turns: list[str]) -> Any:
    return Played("A", Times(1.0, 2.0, 4.0), turns), Played("B", Times(0.5, 2.0, 1.0), turns)


def test_turns_are_abba() -> None:
    turns: list[str] = []
    start, candidate = played(turns)
    pairs = take_pairs(start, candidate, 4)
    assert turns == list("ABBAABBA")
    assert pairs == [(start.times, candidate.times)] * 4


def test_turns_go_on_for_the_time_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    start, candidate = played([])
    # A tick a look at the clock: a whole number of ABBA after 7 of them.
    assert len(take_pairs(start, candidate, 2, 7)) % 2 == 0
    assert len(take_pairs(start, candidate, 2, 7)) > 2


def test_gains_are_the_start_s_seconds_over_the_candidate_s() -> None:
    start, candidate = played([])
    gains = gains_of(take_pairs(start, candidate, 6), "balanced", 0.95)
    assert (gains.decode.ratio, gains.decode_long.ratio, gains.prefill.ratio) == (2.0, 1.0, 4.0)
    # The geometric mean of decoding, itself one, and prefill.
    assert gains.preferred.ratio == pytest.approx((2**0.5 * 4) ** 0.5)
    assert gains.preferred.sure and gains.decode.lower == 2.0 and gains.rounds == 6
    assert gains_of(take_pairs(start, candidate, 6), "decode", 0.95).preferred.ratio == pytest.approx(2**0.5)
    assert gains_of(take_pairs(start, candidate, 6), "prefill", 0.95).preferred.ratio == 4.0


def test_too_few_rounds_have_no_bounds() -> None:
    start, candidate = played([])
    gains = gains_of(take_pairs(start, candidate, 2), "balanced", 0.95)
    assert gains.preferred.lower is None and gains.preferred.upper is None and not gains.preferred.sure


def test_numbers_and_back() -> None:
    start, candidate = played([])
    pairs = take_pairs(start, candidate, 2)
    assert from_numbers(as_numbers(pairs)) == pairs


@pytest.fixture(scope="module")
def architecture(sample: Sample) -> Architecture:
    return Original.open(str(sample.checkpoint), Silent()).architecture


def test_a_side_generates(sample: Sample, architecture: Architecture) -> None:
    slices = Slices((architecture,), len(architecture.layers))
    with Side([sample.bundle], THREADS, slices, WORKLOAD) as side:
        asked: list[str] = []
        (worker,) = side._workers
        ask = worker.ask
        worker.ask = lambda command, kind: (asked.append(command), ask(command, kind))[1]  # type: ignore[method-assign]
        times = side.take()
        assert asked == ["generate 3", "generate"]
        assert min(times.decode, times.decode_long, times.prefill) > 0
    assert worker._process.poll() is not None


def test_no_process_outlives_a_failure(sample: Sample, architecture: Architecture, tmp_path: Path) -> None:
    slices = Slices((architecture, architecture), len(architecture.layers))
    with pytest.raises(MachineError):
        Side([sample.bundle, tmp_path / "nowhere"], THREADS, slices, WORKLOAD)
