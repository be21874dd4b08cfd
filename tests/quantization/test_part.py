"""Parts of a walk, one behind the other."""

from __future__ import annotations

import torch
from tiny import W4G32

from glmexport.quantization.largest import Seen
from glmexport.quantization.nearest import round_to_nearest
from glmexport.quantization.part import QuantizedPart, largest_of
from glmexport.quantization.record import unmeasured


def part_of(key: str, largest: Seen | None = None) -> QuantizedPart:
    matrix = round_to_nearest(torch.arange(128.0).reshape(2, 64), W4G32)
    return QuantizedPart({key: matrix}, (unmeasured(key, 0, "qkv", matrix),), largest)


def test_parts_keep_their_order() -> None:
    whole = QuantizedPart() + part_of("b") + part_of("a")
    assert list(whole.matrices) == ["b", "a"] == [record.key for record in whole.records]
    assert [note["key"] for note in whole.note(1.5)["linears"]] == ["b", "a"] and whole.note(1.5)["seconds"] == 1.5
    weight = whole.weight("a")
    assert weight is not None and torch.equal(weight, whole.matrices["a"].dequantize())
    assert whole.weight("c") is None


def test_neither_part_of_a_sum_changes() -> None:
    first, second = part_of("a"), part_of("b")
    assert set((first + second).matrices) == {"a", "b"}
    assert set(first.matrices) == {"a"} and set(second.matrices) == {"b"}


def test_the_first_of_the_largest_numbers_is_kept() -> None:
    assert largest_of(()) is None and largest_of((None, None)) is None
    assert largest_of((Seen(2.0, "z"), None, Seen(3.0, "y"), Seen(3.0, "a"))) == Seen(3.0, "y")
    assert (part_of("a", Seen(1.0, "x")) + part_of("b")).largest == Seen(1.0, "x")
