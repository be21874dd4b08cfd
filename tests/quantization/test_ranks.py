"""Ranks that share a walk: any number of them gives the same bytes, and one that dies costs no more than its work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import launch
from tiny import digests

from glmexport.calibration.hessian import Hessian, SecondMoment
from glmexport.foundation.errors import EXIT_MACHINE
from glmexport.foundation.files import sha256
from glmexport.quantization.job import row_blocks
from glmexport.quantization.ranks import ALONE, Parcel, longest_first

SCRIPT = Path(__file__).with_name("ranked_walk.py")


def files(work: Path) -> dict[str, str]:
    """Digests of every file that is not a note of how long it took."""
    return {path.name: sha256(path) for path in work.iterdir() if path.suffix not in (".json", ".partial")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The files of each kind of walk by one process."""
    from ranked_walk import KINDS
    from tiny import Model

    found = {}
    for kind, (changes, recipe) in KINDS.items():
        base = tmp_path_factory.mktemp(kind)
        found[kind] = digests(Model(base / "model", **changes).walked(base / "work", recipe))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, count",
    [
        ("dense", 3), ("mixture", 2), ("latent", 2),
        *(pytest.param(*each, marks=pytest.mark.release)
          for each in [("dense", 2), ("dense", 4), ("mixture", 3), ("nearest", 3), ("budget", 2)]),
    ],
)  # fmt: skip
def test_any_number_of_ranks_gives_the_same_bytes(
    kind: str, count: int, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    done = launch(SCRIPT, count, kind, tmp_path, tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "work") == whole[kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rank, item",
    [
        ("dense", 1, 3),
        pytest.param("dense", 0, 60, marks=pytest.mark.release),
        pytest.param("mixture", 1, 80, marks=pytest.mark.release),
    ],
)
def test_a_rank_that_dies_is_missed_and_the_rest_is_kept(
    kind: str, rank: int, item: int, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Another number of ranks goes on from there."""
    work = tmp_path / "work"
    killed = launch(SCRIPT, 2, kind, tmp_path, work, rank, item)
    assert killed.returncode != 0
    assert "RankLost" in killed.stderr or "Signal 9" in killed.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert set(files(work)) != set(whole[kind])
    done = launch(SCRIPT, 3, kind, tmp_path, work)
    assert done.returncode == 0, done.stderr
    assert files(work) == whole[kind]
    # Pieces of a layer have become a part of it.
    committed = [name for name in {*kept} & {*whole[kind]} if (work / name).stat().st_mtime_ns == kept[name]]
    assert item < 10 or "embedding.safetensors" in committed


def test_one_process_alone_shares_with_nobody() -> None:
    computed: list[int] = []

    def compute(item: int) -> Parcel:
        computed.append(item)
        return Parcel((torch.full((2,), float(item)),), {"item": item})

    found: Iterator[tuple[int, Parcel]] = ALONE.each([3, 1, 2], compute)
    item, parcel = next(found)
    assert (item, parcel.facts, computed) == (3, {"item": 3}, [3])
    assert [item for item, _ in found] == [1, 2]
    assert [parcel.facts["item"] for _, parcel in ALONE.collect([5, 4], compute)] == [5, 4]
    assert ALONE.own([1, 2, 3]) == [1, 2, 3]
    assert ALONE.gather("a") == ["a"] and ALONE.decide(lambda: 7) == 7


def test_what_is_sent_is_laid_out_in_order() -> None:
    (sent,) = Parcel((torch.arange(6).reshape(2, 3).T,)).tensors
    assert sent is not None and sent.is_contiguous()


def test_the_costliest_work_is_dealt_out_first() -> None:
    assert longest_first([1, 5, 4, 3], 2) == [0, 0, 1, 1]
    assert longest_first([2, 2, 2], 1) == [0, 0, 0]
    costs = torch.rand(40, generator=torch.Generator().manual_seed(3)).tolist()
    for size in (2, 3, 7):
        owners = longest_first(costs, size)
        load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
        assert max(load) <= (4 / 3) * max(sum(costs) / size, *costs)


@pytest.mark.parametrize("size", [2, 3])
def test_slabs_of_a_moment_are_the_same_whoever_keeps_them(size: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(50, 500) for _ in range(3)]
    whole, wanted = Hessian(500), SecondMoment(500, 500)
    parts = [Hessian(500, rank=rank, size=size) for rank in range(size)]
    moments = [SecondMoment(500, 500, rank=rank, size=size) for rank in range(size)]
    for batch in batches:
        for hessian in (whole, *parts):
            hessian.add(batch)
        for moment in (wanted, *moments):
            moment.add(batch + 1, batch)
    for kept in (parts, moments):
        first = kept[0]
        for other in kept[1:]:
            for slab in other.kept:
                first.slab(*slab).copy_(other.slab(*slab))
    assert torch.equal(parts[0].matrix(), whole.matrix())
    assert torch.equal(moments[0].matrix, wanted.matrix)


@pytest.mark.parametrize(
    "rows, columns, whole, expected",
    [
        # Eight shares, or blocks of 512 rows; what memory allows where one rank has them all.
        (4096, 13696, False, [512] * 8),
        (27392, 4096, False, [3424] * 8),
        (768, 4096, False, [512, 256]),
        (4096, 13696, True, [2449, 1647]),
        # The lm_head has more blocks than that already.
        (151552, 4096, False, [8192] * 18 + [4096]),
    ],
)
def test_a_matrix_is_cut_for_ranks_down_to_blocks_that_are_worth_it(
    rows: int, columns: int, whole: bool, expected: list[int]
) -> None:
    blocks = row_blocks(rows, columns, 1 << 25, whole=whole)
    assert [stop - start for start, stop in blocks] == expected
    assert blocks[0][0] == 0 and blocks[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(blocks))


def test_a_schedule_is_bounded_by_what_can_be_shared(tmp_path: Path) -> None:
    from benchmarks.schedule import LayerSeconds, noted, wall_seconds

    layers = [LayerSeconds((5.0, 4.0, 3.0, 1.0), 10.0), LayerSeconds((), 6.0)]
    assert wall_seconds(layers, 1) == (29.0, 29.0)
    # 5 + 1 and 4 + 3, beside 16 that are shared or not.
    assert wall_seconds(layers, 2) == (7.0 + 8.0, 7.0 + 16.0)
    (tmp_path / "block_003.json").write_text('{"note": {"stages": {"capture": [7.0, 9.0], "solve": [4.5, 4.0]}}}')
    (tmp_path / "block_003.expert_000.json").write_text('{"note": {"seconds": 2.0}}')
    (tmp_path / "block_003.expert_001.json").write_text('{"note": {"seconds": 3.0}}')
    assert noted(tmp_path) == [LayerSeconds((2.0, 3.0), 6.5)]


def test_the_exit_code_of_a_lost_rank_is_that_of_the_machine() -> None:
    from glmexport.quantization.ranks import RankLost

    assert RankLost("Gone.", next_step="Again.").exit_code == EXIT_MACHINE
