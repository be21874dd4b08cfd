"""Halving, the front, the choice and its confirmation, on sides whose seconds are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from glmexport.foundation.errors import MachineError
from glmexport.foundation.evidence import CandidateSettings, Deviation, Divergences
from glmexport.foundation.progress import Silent
from glmexport.quantization.store import WorkDirectory
from glmexport.tuning.candidates import Numerics, identity
from glmexport.tuning.measure import Times
from glmexport.tuning.search import Search

KL = {"w4g32": 0.005, "w4g128": 0.007}


def settings(recipe: str = "w4g32", threads: int = 2, level: int = 4) -> CandidateSettings:
    return CandidateSettings.model_validate(
        {"recipe": recipe, "accuracy_level": level, "packed_qkv": True, "threads": threads}
    )


START = settings()


class Model:
    """The machine: seconds a setting, and how often each was loaded."""

    def __init__(self, seconds: Callable[[CandidateSettings, int], float]) -> None:
        self.seconds = seconds
        self.loaded: list[CandidateSettings] = []
        self.turns = 0

    def load(self, wanted: CandidateSettings) -> Any:
        self.loaded.append(wanted)
        return Loaded(self, wanted)


class Loaded:
    def __init__(self, model: Model, wanted: CandidateSettings) -> None:
        self.model, self.wanted = model, wanted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self) -> Times:
        self.model.turns += 1
        seconds = self.model.seconds(self.wanted, self.model.turns)
        return Times(seconds, seconds, seconds)


def search(model: Model, work: Path) -> Search:
    def known(kl: float) -> Divergences:
        deviation = Deviation(mean=kl, upper=kl, worst=kl, language="en")
        return Divergences(original=deviation, arithmetic=deviation, positions=1)

    return Search(
        start=START,
        load=model.load,
        divergences={Numerics(name, level): known(kl + level / 1e4) for name, kl in KL.items() for level in (0, 4)},
        work=WorkDirectory(work, {}),
        prefer="balanced",
        confidence=0.95,
        seconds=0,
        progress=Silent(),
    )


EVERY = [
    settings(recipe, threads, level)
    for recipe in KL
    for threads in (1, 2, 4)
    for level in (0, 4)
    if (recipe, threads, level) != ("w4g32", 2, 4)
]


def plain(wanted: CandidateSettings, turn: int) -> float:
    return (8 if wanted.accuracy_level == 0 else 1) * (0.8 if wanted.recipe == "w4g128" else 1) / wanted.threads


def test_the_fastest_of_all(tmp_path: Path) -> None:
    model = Model(plain)
    searched = search(model, tmp_path)
    chosen, confirmed = searched.choose(EVERY, start_is_legal=True)
    assert chosen is not None and confirmed is not None
    assert chosen.settings == settings("w4g128", 4)
    assert confirmed.preferred.ratio == pytest.approx(2.5) and confirmed.preferred.sure
    fates = {identity(each): searched.fates[identity(each)].outcome for each in EVERY}
    assert fates[identity(chosen.settings)] == "chosen"
    # Slower, but nothing faster diverges as little.
    assert fates[identity(settings("w4g32", 4, 0))] == "front"
    assert fates[identity(settings("w4g128", 1))] == "beaten"
    # A hopeless one is loaded once, the choice four times.
    assert model.loaded.count(settings("w4g128", 1)) == 1
    assert model.loaded.count(chosen.settings) == 4


def test_nothing_is_faster(tmp_path: Path) -> None:
    searched = search(Model(lambda wanted, turn: 1.0 if wanted == START else 1.1), tmp_path)
    assert searched.choose(EVERY, start_is_legal=True) == (None, None)
    assert "chosen" not in {fate.outcome for fate in searched.fates.values()}


def test_a_lucky_one_is_not_confirmed(tmp_path: Path) -> None:
    lucky = settings("w4g128", 4)

    def seconds(wanted: CandidateSettings, turn: int) -> float:
        return 0.9 if wanted == lucky and model.loaded.count(lucky) < 4 else 1.0

    model = Model(seconds)
    searched = search(model, tmp_path)
    chosen, confirmed = searched.choose(EVERY, start_is_legal=True)
    assert chosen is None and confirmed is not None and confirmed.preferred.ratio == 1.0
    assert "not surely so" in searched.fates[identity(lucky)].reason


def test_without_a_legal_start_a_slower_one_is_taken(tmp_path: Path) -> None:
    legal = [each for each in EVERY if each.accuracy_level == 0]
    chosen, confirmed = search(Model(plain), tmp_path).choose(legal, start_is_legal=False)
    assert chosen is not None and confirmed is not None
    assert chosen.settings == settings("w4g128", 4, 0) and confirmed.preferred.ratio < 1


def test_what_does_not_run_here_ends_nothing(tmp_path: Path) -> None:
    class Partly(Model):
        def load(self, wanted: CandidateSettings) -> Any:
            if wanted.threads == 4:
                raise MachineError("No such kernel.", next_step="None.")
            return super().load(wanted)

    searched = search(Partly(plain), tmp_path)
    chosen, _ = searched.choose(EVERY, start_is_legal=True)
    assert chosen is not None and chosen.settings == settings("w4g128", 2)
    fate = searched.fates[identity(settings("w4g32", 4))]
    assert fate.outcome == "illegal" and "No such kernel" in fate.reason
    assert any("does not run here" in remark for remark in searched.progress.remarks)  # type: ignore[attr-defined]


def test_a_start_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    class Broken(Model):
        def load(self, wanted: CandidateSettings) -> Any:
            raise MachineError("No such kernel.", next_step="None.")

    with pytest.raises(MachineError):
        search(Broken(plain), tmp_path).choose(EVERY, start_is_legal=True)


def test_finished_measurements_are_taken_again(tmp_path: Path) -> None:
    def stopping(wanted: CandidateSettings, turn: int) -> float:
        if turn > 60:
            raise KeyboardInterrupt
        return plain(wanted, turn)

    first = Model(stopping)
    with pytest.raises(KeyboardInterrupt):
        search(first, tmp_path).choose(EVERY, start_is_legal=True)
    second = Model(plain)
    resumed = search(second, tmp_path).choose(EVERY, start_is_legal=True)
    whole = Model(plain)
    assert resumed == search(whole, tmp_path / "other").choose(EVERY, start_is_legal=True)
    # What was measured before the interruption is not loaded again.
    assert 0 < len(second.loaded) < len(whole.loaded)
    third = Model(plain)
    assert search(third, tmp_path).choose(EVERY, start_is_legal=True) == resumed and not third.loaded


def test_there_may_be_nothing_to_try(tmp_path: Path) -> None:
    assert search(Model(plain), tmp_path).choose([], start_is_legal=True) == (None, None)
