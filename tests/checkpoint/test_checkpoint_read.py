"""Reading the tensors of an opened checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoint_builders import entry, write_checkpoint, write_raw

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError, MachineError

A = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float64, torch.bfloat16])
def test_a_tensor_is_converted(stored: torch.dtype, wanted: torch.dtype | None, tmp_path: Path) -> None:
    weight = torch.linspace(-2, 2, 12).reshape(3, 4).to(stored)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": {"w": weight}}))
    expected = weight.to(wanted or torch.float32)
    for found in (checkpoint.read("w", wanted), checkpoint.rows("w", 0, 3, wanted)):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert torch.equal(checkpoint.rows("w", 1, 2, wanted), expected[1:2])
    assert checkpoint.rows("w", 2, 2, wanted).shape == (0, 4)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": tensors}))
    assert checkpoint.read("scalar").item() == 2.5
    assert checkpoint.read("empty").shape == (0, 3)


def test_what_is_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    found, rows = checkpoint.read("a"), checkpoint.rows("a", 1, 3)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.write(bytes(stream.seek(0, 2)))
    assert torch.equal(found, A)
    assert torch.equal(rows, A[1:])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_rows_outside_of_the_tensor_are_a_bug(start: int, stop: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=re.escape(f"rows [{start}, {stop}) of 'a', whose shape is (3, 2)")):
        checkpoint.rows("a", start, stop)


def test_a_missing_tensor_is_answered_with_the_nearest(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": tensors}))
    for read in (checkpoint.read, checkpoint.shape, lambda name: checkpoint.rows(name, 0, 1)):
        with pytest.raises(
            CheckpointError, match=r"no tensor 'model\.norm\.weigth'.*Did you mean 'model\.norm\.weight'"
        ):
            read("model.norm.weigth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_counted_and_located(
    value: float, stored: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.ones(5, 3, 2, dtype=stored)
    weight[3, 1, 0] = value
    weight[4, 2, 1] = value
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": {"w": weight}}))
    message = re.escape("tensor 'w' has 2 values that are not finite, the first at [3, 1, 0]")
    with pytest.raises(CheckpointError, match=message) as refusal:
        checkpoint.read("w")
    assert str(tmp_path / "model.safetensors") in str(refusal.value)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.rows("w", 2, 5)
    assert torch.equal(checkpoint.rows("w", 0, 3), torch.ones(3, 3, 2))


def test_a_value_that_does_not_fit_the_wanted_type_is_refused(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 1e6])
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": {"w": weight}}))
    with pytest.raises(
        CheckpointError, match=r"tensor 'w' has 1 values too large for float16, the first at \[1\]"
    ):
        checkpoint.read("w", torch.float16)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F64", 64), ("F8_E4M3", 8), ("I32", 32), ("U8", 8), ("BOOL", 8)]
)
def test_a_tensor_that_is_no_weight_is_refused_when_it_is_read(dtype: str, bits: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {}) / "model.safetensors"
    write_raw(path, {"w": entry(dtype, (2,), 0, bits // 4)}, bytes(bits // 4))
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"tensor 'w' is stored as {dtype}; accepted are F32, F16, BF16"
    ) as refusal:
        checkpoint.read("w")
    assert str(path) in str(refusal.value)


def test_a_shard_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=re.escape(f"{path} changed since")):
        checkpoint.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{path} cannot be read")):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            OSError(5, "Input/output error"),
            MachineError,
            "model.safetensors cannot be read: Input/output error",
        ),
        (MemoryError(), MachineError, "Not enough memory for tensor 'a'"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            MachineError,
            "Not enough memory",
        ),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_a_failure_of_the_machine_is_told_from_a_bug(
    raised: Exception,
    expected: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    monkeypatch.setattr("safetensors.safe_open", fail)
    with pytest.raises(expected, match=message):
        checkpoint.read("a")
