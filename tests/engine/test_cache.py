"""Caches of every type: one description, one place in memory, and no position that is lost where they grow."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from glmexport.engine.core.cache import CACHE_TYPES, CacheSpec, GrowingCaches, SharedCaches

HEADS = ("batch", 2, "past_sequence", 3)
LATENTS = ("batch", "capacity", 5)
FIXED = (1, 8, 4)


def spec(shape: tuple[int | str, ...], dtype: str = "float32") -> CacheSpec:
    return CacheSpec("past", "present", shape, dtype)


def held(caches: SharedCaches | GrowingCaches, of: CacheSpec) -> np.ndarray:
    return of.array(caches._values[of.input])


def test_the_axis_of_positions_is_named() -> None:
    assert [spec(shape).axis for shape in (HEADS, LATENTS, FIXED)] == [2, 1, None]
    assert [spec(shape).grows for shape in (HEADS, LATENTS, FIXED)] == [True, False, False]


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_empty_ones_of_every_type(dtype: str) -> None:
    value = spec(HEADS, dtype).empty(3, 7)
    names = {"float32": "float", "float16": "float16"}
    assert value.data_type() == f"tensor({names.get(dtype, dtype)})"
    array = spec(HEADS, dtype).array(value)
    assert array.shape == (3, 2, 7, 3) and not array.any()
    # The array is the memory of the value.
    array[1, 1, 6, 2] = 1
    assert spec(HEADS, dtype).array(value)[1, 1, 6, 2] == 1
    assert spec(HEADS, dtype).array(spec(HEADS, dtype).empty(3, 0)).shape == (3, 2, 0, 3)


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("shape", [HEADS, LATENTS], ids=["heads", "latents"])
def test_growing_keeps_what_is_there(dtype: str, shape: tuple[int | str, ...]) -> None:
    one = spec(shape, dtype)
    caches = SharedCaches([one], 2, 16, 40)
    caches.reserve(3)
    assert caches.capacity == 16
    held(caches, one)[one.first(16)] = 1
    caches.reserve(16)
    assert caches.capacity == 16
    caches.reserve(17)
    assert caches.capacity == 32 and held(caches, one)[one.first(16)].all()
    assert held(caches, one).sum(dtype=np.int64) == held(caches, one)[one.first(16)].size
    caches.reserve(40)
    assert caches.capacity == 40 and caches.bytes == held(caches, one).nbytes


def test_rows_are_places_in_the_whole() -> None:
    one = spec(HEADS)
    caches = SharedCaches([one], 4, 8, 64)
    caches.reserve(1)
    rows = caches.rows(1, 2)
    assert caches.rows(1, 2) is rows
    part = one.array(rows._values["past"])
    part[:] = 3
    assert part.shape == (2, 2, 8, 3)
    assert held(caches, one)[1:3].min() == 3 and not held(caches, one)[[0, 3]].any()
    caches.reserve(9)
    assert caches.rows(1, 2) is not rows
    assert one.array(caches.rows(1, 2)._values["past"])[:, :, :8].min() == 3


def test_fixed_shapes_are_those_of_the_graph() -> None:
    one = spec(FIXED, "float16")
    caches = SharedCaches([one], 1, 8, 8)
    caches.reserve(8)
    assert held(caches, one).shape == FIXED and caches.bytes == 64


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_growing_ones_are_cut(dtype: str) -> None:
    one = spec(HEADS, dtype)
    caches = GrowingCaches([one], 1)
    assert held(caches, one).shape == (1, 2, 0, 3)
    longer = np.arange(30).reshape(1, 2, 5, 3).astype(CACHE_TYPES[dtype])
    caches.take([one.value(longer)])
    caches.cut(2)
    assert np.array_equal(held(caches, one), longer[:, :, :2])


def test_onnx_s_number_of_bfloat16() -> None:
    onnx = pytest.importorskip("onnx")
    value = spec(LATENTS, "bfloat16").empty(1, 1)
    assert isinstance(value, onnxruntime.OrtValue)
    assert value.element_type() == onnx.TensorProto.BFLOAT16
