"""Finished pieces of a validation: read after an interruption, shared by ranks, and the same figures either way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builds import Sample, build, small_checkpoint
from launching import launch
from models import MIXTURE
from ranked_validation import figures, small_batches

from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.quantization.ranks import Parcel
from glmexport.reference.reference import Reference
from glmexport.validation.pieces import UNKEPT, Pieces

SCRIPT = Path(__file__).with_name("ranked_validation.py")
PARCEL = Parcel((torch.arange(6.0).reshape(2, 3), None, torch.empty(0, dtype=torch.int64)), {"answer": [1, 2]})


def same(found: Parcel | None, expected: Parcel) -> bool:
    return found is not None and found.facts == expected.facts and all(
        theirs is ours if ours is None else theirs is not None and torch.equal(theirs, ours)
        for theirs, ours in zip(found.tensors, expected.tensors, strict=True)
    )  # fmt: skip


def test_a_piece_is_read_as_it_was_kept(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "kept", {"bundle": "a"})
    assert pieces.load("kind", ["name", 1]) is None
    pieces.save("kind", ["name", 1], PARCEL)
    assert same(pieces.load("kind", ["name", 1]), PARCEL)
    pieces.drop("kind", ["name", 1])
    assert pieces.load("kind", ["name", 1]) is None and not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("damage", ["a bit", "cut", "nothing left", "of another"])
def test_a_damaged_piece_is_not_used(damage: str, tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, {"bundle": "a"})
    pieces.save("kind", "name", PARCEL)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 1
    elif damage == "of another":
        pieces.save("kind", "other", PARCEL)
        (other,) = {*tmp_path.iterdir()} - {path}
        content = bytearray(other.read_bytes())
    else:
        content = content[: len(content) // 2 if damage == "cut" else 0]
    path.write_bytes(content)
    assert pieces.load("kind", "name") is None
    computed: list[int] = []

    def compute(absent: Any) -> Any:
        computed.extend(absent)
        yield 0, PARCEL

    assert same(pieces.each("kind", ["name"], compute)[0], PARCEL)
    assert computed == [0] and same(pieces.load("kind", "name"), PARCEL)


def test_a_piece_of_another_job_is_not_used(tmp_path: Path) -> None:
    Pieces(tmp_path, {"bundle": "a"}).save("kind", "name", PARCEL)
    assert Pieces(tmp_path, {"bundle": "b"}).load("kind", "name") is None
    assert Pieces(tmp_path, {"bundle": "a"}).load("other", "name") is None


def test_each_computes_what_is_absent_and_keeps_it_at_once(tmp_path: Path) -> None:
    pieces, computed = Pieces(tmp_path), list[int]()

    def compute(absent: Any) -> Any:
        for index in absent:
            if index == 2 and not computed.count(1) > 1:
                raise KeyboardInterrupt
            computed.append(index)
            yield index, Parcel(facts=10 * index)

    with pytest.raises(KeyboardInterrupt):
        pieces.each("kind", ["a", "b", "c"], compute)
    assert computed == [0, 1]
    computed.append(1)
    assert [parcel.facts for parcel in pieces.each("kind", ["a", "b", "c"], compute)] == [0, 10, 20]
    assert computed == [0, 1, 1, 2]
    assert [parcel.facts for parcel in pieces.each("kind", ["a", "b", "c"], lambda _: pytest.fail("again"))] == [
        0, 10, 20,
    ]  # fmt: skip


def test_without_a_directory_nothing_is_kept() -> None:
    UNKEPT.save("kind", "name", PARCEL)
    assert UNKEPT.load("kind", "name") is None and UNKEPT.walk("kind", "name") is None
    assert UNKEPT.one("kind", "name", lambda: 7) == 7


#: The calls of a validation that take long.
CALLS = {
    "blocks": (Reference, "block"),
    "texts": (ScoringSession, "logits"),
    "answers": (GenerationSession, "together"),
}


def counted(run: Callable[[], Any], stop: tuple[str, int] | None = None) -> tuple[Any, Counter[str]]:
    """Return what ``run`` returns, or None where it was interrupted at a call, and how often each was made."""
    calls: Counter[str] = Counter()

    def wrapped(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            if stop == (name, calls[name]):
                raise KeyboardInterrupt
            calls[name] += 1
            return plain(*values, **named)

        return call

    patches = [patch.object(owner, name, wrapped(key, vars(owner)[name])) for key, (owner, name) in CALLS.items()]
    for each in patches:
        each.start()
    try:
        return run(), calls
    except KeyboardInterrupt:
        return None, calls
    finally:
        for each in patches:
            each.stop()


@pytest.fixture(scope="module")
def whole(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Counter[str]]:
    """The figures of a validation that nothing interrupts, and its calls."""
    work = tmp_path_factory.mktemp("whole")
    return counted(lambda: figures(sample.checkpoint, sample.bundle, work))


@pytest.mark.slow
def test_a_killed_validation_goes_on(sample: Sample, whole: tuple[Any, Counter[str]], tmp_path: Path) -> None:
    """Interrupted in every part of it, one after the other."""
    expected, calls = whole

    def run() -> Any:
        return figures(sample.checkpoint, sample.bundle, tmp_path)

    # Of 42 answers two at a time are computed together, and three alone as well.
    assert calls["blocks"] >= 8 and calls["texts"] >= 21 and calls["answers"] >= 21 + 3
    # The second block of the original; of the bundle's weights; of a pass for the answers.
    stops = [("blocks", 1), ("texts", 9), ("blocks", 1), ("answers", 11), ("blocks", 2), None]
    made: Counter[str] = Counter()
    for stop in stops:
        found, more = counted(run, stop)
        assert (found is None) == (stop is not None)
        made += more
    assert found == expected
    # Each time at most the piece that was under way is computed again.
    assert calls["blocks"] <= made["blocks"] <= calls["blocks"] + 2
    assert calls["texts"] <= made["texts"] < calls["texts"] + 24
    # Drafts are no pieces: those of the pass that was interrupted are computed again.
    assert calls["answers"] <= made["answers"] <= calls["answers"] + 21


@pytest.mark.slow
def test_pieces_of_another_bundle_are_not_used(
    sample: Sample, whole: tuple[Any, Counter[str]], tmp_path: Path
) -> None:
    figures(sample.checkpoint, sample.bundle, tmp_path)
    for path in (tmp_path / "validation").iterdir():
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[40] ^= 1
            path.write_bytes(content)
    found, calls = counted(lambda: figures(sample.checkpoint, sample.bundle, tmp_path))
    assert found == whole[0] and calls == whole[1]


@pytest.mark.slow
def test_a_build_goes_on_in_the_middle_of_its_validation(sample: Sample, tmp_path: Path) -> None:
    """With the pieces in the work directory, which is gone when the bundle is in its place."""
    output = tmp_path / "bundle"

    def run() -> Any:
        with small_batches():
            return build(sample.checkpoint, output, sample.recipe)[0].report

    found, before = counted(run, ("texts", 15))
    assert found is None and before["texts"] == 15
    (work,) = tmp_path.iterdir()
    assert list((work / "validation").glob("divergences-*.piece"))
    found, after = counted(run)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    # The blocks that are read are those of the bundle's weights, and the texts those of the batch under way and later.
    assert after["blocks"] == 2 and after["texts"] == len(found.fidelity.languages) - 12
    expected = sample.built.report
    for name in ("fidelity", "shares", "routing", "weights", "prompts", "reference"):
        assert getattr(found, name) == getattr(expected, name), name


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.release)])
def test_any_number_of_ranks_finds_the_same_figures(
    count: int, sample: Sample, whole: tuple[Any, Counter[str]], tmp_path: Path
) -> None:
    done = launch(SCRIPT, count, sample.checkpoint, sample.bundle, tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out") == whole[0]


@pytest.mark.release
def test_ranks_find_the_same_figures_of_a_mixture(sample: Sample, tmp_path: Path) -> None:
    """Experts see the positions of one batch together, whoever takes it."""
    small_checkpoint(tmp_path / "checkpoint", "glm4_moe", **MIXTURE)
    build(tmp_path / "checkpoint", tmp_path / "bundle", sample.recipe)
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    expected = figures(tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "alone")
    assert "LayerRouting" in expected["routing"]
    done = launch(SCRIPT, 2, tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "shared", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out") == expected


@pytest.mark.release
@pytest.mark.parametrize("rank, pieces", [(1, 1), (0, 30), (1, 45)])
def test_a_rank_that_dies_loses_its_piece_alone(
    rank: int, pieces: int, sample: Sample, whole: tuple[Any, Counter[str]], tmp_path: Path
) -> None:
    """Another number of ranks goes on from there."""
    arguments = (sample.checkpoint, sample.bundle, tmp_path, tmp_path / "out")
    killed = launch(SCRIPT, 2, *arguments, rank, pieces)
    assert killed.returncode != 0
    assert "RankLost" in killed.stderr or "Signal 9" in killed.stderr
    kept = [path.name for path in (tmp_path / "validation").glob("*.piece")]
    assert len(kept) >= pieces and not (tmp_path / "out").exists()
    times = {name: (tmp_path / "validation" / name).stat().st_mtime_ns for name in kept if "-pass-" not in name}
    done = launch(SCRIPT, 3, *arguments)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out") == whole[0]
    assert all((tmp_path / "validation" / name).stat().st_mtime_ns == time for name, time in times.items())
