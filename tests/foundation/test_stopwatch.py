"""Seconds are counted for the part that runs, and for the innermost one alone."""

from collections.abc import Iterator

import pytest

from glmexport.foundation import stopwatch as module
from glmexport.foundation.stopwatch import Stopwatch


class Clock:
    """Wall and processor time that pass as told."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def pass_by(self, wall: float, processor: float) -> None:
        self.wall += wall
        self.processor += processor

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    passing = Clock()
    monkeypatch.setattr(module, "time", passing)
    return passing


def test_an_inner_part_is_not_counted_for_the_outer_one(clock: Clock) -> None:
    watch = Stopwatch()
    parts = watch.begin()
    clock.pass_by(100, 100)
    with watch.running("outer"):
        clock.pass_by(1, 2)
        with watch.running("inner"):
            clock.pass_by(10, 20)
        clock.pass_by(3, 4)
    clock.pass_by(100, 100)
    with watch.running("inner"):
        clock.pass_by(5, 6)
    assert parts == {"outer": [4, 6], "inner": [15, 26]}


def test_values_are_timed_while_they_are_made_and_not_while_they_are_used(clock: Clock) -> None:
    def made() -> Iterator[int]:
        for value in range(3):
            clock.pass_by(1, 1)
            yield value
        clock.pass_by(7, 7)

    watch = Stopwatch()
    parts = watch.begin()
    for used, value in enumerate(watch.through("making", made())):
        assert value == used
        clock.pass_by(50, 50)
    assert parts == {"making": [10, 10]}


def test_a_new_beginning_leaves_what_was_noted_before(clock: Clock) -> None:
    watch = Stopwatch()
    before = watch.begin()
    with watch.running("part"):
        clock.pass_by(1, 1)
    after = watch.begin()
    with watch.running("part"):
        clock.pass_by(2, 2)
    assert (before, after) == ({"part": [1, 1]}, {"part": [2, 2]})
