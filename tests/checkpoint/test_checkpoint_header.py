"""The safetensors header: what is read, and every way in which a file can lie."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoint_builders import entry, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glmexport.checkpoint.header import read_header
from glmexport.foundation.errors import CheckpointError


def test_a_header_of_the_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 7),
        "ids": torch.zeros(2, dtype=torch.int64),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: found.shape for name, found in header.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert header["w"].dtype == "BF16"
    assert (header["w"].elements, header["w"].bytes) == (15, 30)
    assert (header["scalar"].elements, header["empty"].elements) == (1, 0)
    assert all(found.path == path for found in header.values())


def test_every_offset_is_the_librarys(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "s.safetensors", {"b": entry(begin=8, end=16), "a": entry()}, bytes(16))
    assert [(name, found.begin, found.end) for name, found in read_header(path).items()] == [
        ("a", 0, 8),
        ("b", 8, 16),
    ]


HOSTILE: dict[str, tuple[object, bytes, int | None, str]] = {
    "header longer than the file": (b"{}", b"", 50, "truncated in its header: 48 bytes are missing"),
    "header of 2^63 bytes": (b"{}", b"", 2**63, "9,223,372,036,854,775,808 bytes; at most 33,554,432"),
    "data truncated": (
        {"w": entry()},
        bytes(5),
        None,
        "truncated: 3 of 8 bytes of data are missing, from tensor 'w' on",
    ),
    "data too long": ({"w": entry()}, bytes(9), None, "1 bytes after tensor 'w' that no tensor describes"),
    "overlap": (
        {"w": entry(), "v": entry(begin=4, end=12)},
        bytes(12),
        None,
        "tensor 'v' begins inside tensor 'w'",
    ),
    "hole": (
        {"w": entry(), "v": entry(begin=12, end=20)},
        bytes(20),
        None,
        "hole of 4 bytes between tensor 'w' and tensor 'v'",
    ),
    "hole at the start": (
        {"w": entry(begin=4, end=12)},
        bytes(12),
        None,
        "hole of 4 bytes between the start",
    ),
    "far out of bounds": (
        {"w": entry(shape=(2**40,), begin=0, end=2**42)},
        bytes(8),
        None,
        "4,398,046,511,096 of 4,398,046,511,104 bytes of data are missing",
    ),
    "wrong size": (
        {"w": entry(shape=(3,))},
        bytes(8),
        None,
        "tensor 'w' with 8 bytes of data, and F32 of shape [3] needs 12",
    ),
    "size that overflows 64 bits": (
        {"w": entry(shape=(2**62, 2**62, 4), begin=0, end=0)},
        b"",
        None,
        "tensor 'w' with 0 bytes of data",
    ),
    "negative dimension": ({"w": entry(shape=(-2,))}, bytes(8), None, "'w' whose shape is not a list"),
    "boolean dimension": ({"w": entry(shape=[True, 2])}, bytes(8), None, "'w' whose shape is not a list"),
    "fractional dimension": ({"w": entry(shape=[2.0])}, bytes(8), None, "'w' whose shape is not a list"),
    "100 dimensions": ({"w": entry(shape=[1] * 99 + [2])}, bytes(8), None, "at most 64"),
    "offsets descending": (
        {"w": entry(begin=8, end=0)},
        bytes(8),
        None,
        "'w' whose data_offsets are not two ascending",
    ),
    "offsets negative": (
        {"w": entry(begin=-8, end=0)},
        bytes(8),
        None,
        "'w' whose data_offsets are not two ascending",
    ),
    "unknown dtype": ({"w": entry(dtype="F31")}, bytes(8), None, "'w' of the unknown dtype 'F31'"),
    "dtype is a list": (
        {"w": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}},
        bytes(8),
        None,
        "unknown dtype []",
    ),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "'w' without exactly dtype, shape"),
    "entry is a number": ({"w": 3}, b"", None, "'w' without exactly dtype, shape"),
    "duplicate tensor": (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        None,
        "key 'w' is given twice",
    ),
    "not JSON": (b"{nonsense", b"", None, "no JSON at line 1, column 2"),
    "not an object": (b"[1, 2]", b"", None, "not a safetensors file"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "byte 2 is not UTF-8"),
    "nested without end": (b'{"w":' * 200_000, b"", None, "nests deeper than 3"),
    "metadata of numbers": (
        {"__metadata__": {"step": 3}},
        b"",
        None,
        "__metadata__ that is not a table of texts",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    header, data, length, message = HOSTILE[case]
    path = write_raw(tmp_path / "shard.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        read_header(path)
    assert str(path) in refusal.value.message
    assert "Download the shard again" in refusal.value.next_step


@pytest.mark.parametrize("content", [b"", b"\x02\0\0"])
def test_a_file_shorter_than_the_length_field_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} has {len(content)} bytes"):
        read_header(path)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "absent.safetensors")


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=200),
    flips=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    data: bytes, flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_raw(
        tmp_path_factory.getbasetemp() / "fuzz.safetensors",
        {"w": entry(), "v": entry(begin=8, end=16)},
        bytes(16),
    )
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(bytes(content) if flips else data)
    try:
        header = read_header(path)
    except CheckpointError as refusal:
        assert str(path) in refusal.message
    else:
        assert sum(found.bytes for found in header.values()) <= path.stat().st_size
