"""The work directory: what is committed comes back, and what is not committed or not whole does not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matrices import EVERY_FORM, generator, random_linear
from torch import Tensor

from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import sha256, write_atomically
from glmexport.quantization import store
from glmexport.quantization.store import WorkDirectory

JOB = {"checkpoint": "sha256:abc", "recipe": "w4g32", "batch": [512, 4096]}
LINEARS = {form.label: random_linear(6, 200, form, index) for index, form in enumerate(EVERY_FORM)}


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    return WorkDirectory.for_job(tmp_path, JOB)


def states(count: int = 10) -> Tensor:
    return torch.randn(count, 4, 8, generator=generator(0))


def pieces(whole: Tensor) -> Iterator[Tensor]:
    # Not contiguous and not of one size, as a last batch is.
    yield from whole.transpose(0, 1).contiguous().transpose(0, 1).split(3)


def commit(work: WorkDirectory) -> None:
    work.commit(
        "block_000", LINEARS, {"seconds": 1.5}, {"quantized": pieces(states()), "original": iter([2 * states()])}
    )


def test_a_committed_step_comes_back(work: WorkDirectory) -> None:
    assert work.record("block_000") is None
    commit(work)
    record = work.record("block_000")
    assert record is not None and record["note"] == {"seconds": 1.5}
    assert set(record["files"]) == {
        "block_000.safetensors",
        "block_000.quantized.activations",
        "block_000.original.activations",
    }
    assert work.formats("block_000") == {key: linear.form for key, linear in LINEARS.items()}
    for key, linear in LINEARS.items():
        found = work.linear("block_000", key)
        assert torch.equal(found.codes, linear.codes) and torch.equal(found.scales, linear.scales)
        assert torch.equal(found.dequantize(), linear.dequantize())
        assert torch.equal(work.packed("block_000", key, "codes"), linear.pack()["codes"])
        assert torch.equal(work.packed("block_000", key, "scales"), linear.scales)
        zero_points = linear.pack().get("zero_points")
        if zero_points is not None:
            assert torch.equal(work.packed("block_000", key, "zero_points"), zero_points)


def test_a_step_may_be_empty(work: WorkDirectory) -> None:
    work.commit("embedding", {}, {})
    assert work.record("embedding") is not None
    assert work.formats("embedding") == {}


def test_activations_are_read_by_slices(work: WorkDirectory) -> None:
    commit(work)
    activations = work.activations("block_000", "quantized", (10, 4, 8))
    for start, stop in ((0, 10), (0, 1), (3, 7), (9, 10)):
        assert torch.equal(activations.read(start, stop), states()[start:stop])
    assert torch.equal(work.activations("block_000", "original", (10, 4, 8)).read(2, 5), 2 * states()[2:5])
    with pytest.raises(EOFError, match="ends early"):
        activations.read(8, 11)


@pytest.mark.parametrize("name", ["block_000.safetensors", "block_000.original.activations"])
@pytest.mark.parametrize("damage", ["one bit", "truncated", "longer"])
def test_a_file_that_changed_undoes_the_commit(work: WorkDirectory, name: str, damage: str) -> None:
    commit(work)
    path = work.path / name
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    elif damage == "truncated":
        del content[-1]
    else:
        content.append(0)
    path.write_bytes(content)
    assert work.record("block_000") is None
    commit(work)
    assert work.record("block_000") is not None


@pytest.mark.parametrize(
    "content",
    [*range(0, 1500, 97), b"null", b"{}", b'{"files": {"a": 1}}', b"[" * 100_000, b"\xff\xfe", bytes(4096)],
    ids=lambda content: str(content)[:20],
)
def test_a_record_that_was_cut_is_none(work: WorkDirectory, content: int | bytes) -> None:
    commit(work)
    path = work.path / "block_000.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: content % len(whole)] if isinstance(content, int) else content)
    assert work.record("block_000") is None
    commit(work)
    assert path.read_bytes() == whole and work.record("block_000") is not None


def test_a_record_that_is_no_file_is_none(work: WorkDirectory) -> None:
    (work.path / "block_000.json").mkdir()
    assert work.record("block_000") is None


def test_a_weights_file_that_is_gone_undoes_the_commit(work: WorkDirectory) -> None:
    commit(work)
    (work.path / "block_000.safetensors").unlink()
    assert work.record("block_000") is None


def test_dropped_activations_do_not(work: WorkDirectory) -> None:
    commit(work)
    work.drop_activations("block_000")
    work.drop_activations("block_000")
    assert not any(work.has_activations("block_000", name) for name in ("quantized", "original"))
    assert not list(work.path.glob("*.activations"))
    assert work.record("block_000") is not None


def test_what_a_killed_walk_leaves_behind_does_not_exist(work: WorkDirectory) -> None:
    for name in ("partial", "safetensors", "quantized.activations.partial", "json.partial"):
        (work.path / f"block_000.{name}").write_bytes(b"half a fi")
    assert work.record("block_000") is None
    commit(work)
    assert work.record("block_000") is not None
    assert torch.equal(work.activations("block_000", "quantized", (10, 4, 8)).read(0, 10), states())


def test_nobody_else_works_there_meanwhile(work: WorkDirectory, tmp_path: Path) -> None:
    other = WorkDirectory.for_job(tmp_path, JOB)
    with work.locked():
        with pytest.raises(MachineError, match="at work"), other.locked():
            pytest.fail("two at work")
        with WorkDirectory.for_job(tmp_path, {"recipe": "another"}).locked():
            pass
    with other.locked():
        pass


def test_a_stream_that_has_a_file_is_moved(work: WorkDirectory) -> None:
    scratch = work.scratch("original", (10, 4, 8))
    scratch.write(0, states())
    work.commit("block_000", {}, {}, {"original": scratch})
    assert not scratch.path.exists()
    assert torch.equal(work.activations("block_000", "original", (10, 4, 8)).read(0, 10), states())
    scratch.write(0, 2 * states())
    assert torch.equal(work.activations("block_000", "original", (10, 4, 8)).read(0, 10), states())
    assert work.record("block_000") is not None


def test_the_disk_writes_a_stream_while_it_is_computed(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a walk would wait for gigabytes at the end of every block."""
    chunks = [torch.full((1, 3, 8), float(index)) for index in range(5)]
    size = chunks[0].nbytes
    on_disk: list[int] = []
    monkeypatch.setattr(store, "_SYNCED_BYTES", 2 * size)
    monkeypatch.setattr(store.os, "fsync", lambda file: on_disk.append(os.fstat(file).st_size))
    work.commit("block", {}, {}, {"stream": iter(chunks)})
    # Of the matrices, of two chunks each, of the rest, and of the record.
    assert on_disk[1:4] == [2 * size, 4 * size, 5 * size]
    assert torch.equal(work.activations("block", "stream", (5, 3, 8)).read(0, 5), torch.cat(chunks))


def test_a_disk_that_is_full_while_a_stream_is_written_fails_the_commit(work: WorkDirectory) -> None:
    partial = work.path / "block_000.quantized.activations.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        work.commit("block_000", {}, {}, {"quantized": (torch.zeros(4, 64, 1024) for _ in range(3))})
    assert work.record("block_000") is None


def test_a_commit_that_fails_leaves_no_record(work: WorkDirectory) -> None:
    def broken() -> Iterator[Tensor]:
        yield states()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.commit("block_000", LINEARS, {}, {"quantized": broken()})
    assert work.record("block_000") is None


def test_a_failed_second_commit_does_not_pass_for_the_first(work: WorkDirectory) -> None:
    """New weights under the old record would be taken for what the record describes."""
    commit(work)

    def broken() -> Iterator[Tensor]:
        yield states()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.commit("block_000", {"w4g16": LINEARS["w8g16"]}, {}, {"quantized": broken()})
    assert work.record("block_000") is None


def test_each_job_has_its_own_directory(tmp_path: Path) -> None:
    first = WorkDirectory.for_job(tmp_path, JOB)
    again = WorkDirectory.for_job(tmp_path, dict(reversed(JOB.items())))
    assert again.path == first.path
    others = [JOB | {key: "another"} for key in JOB] + [JOB | {"threads": 2}]
    assert len({WorkDirectory.for_job(tmp_path, job).path for job in others} | {first.path}) == len(others) + 1
    assert first.path.name.startswith(".glmexport-work-")


def test_reopening_keeps_what_is_committed(work: WorkDirectory) -> None:
    commit(work)
    assert WorkDirectory.for_job(work.path.parent, JOB).record("block_000") == work.record("block_000")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def fails(_descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert sha256(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
