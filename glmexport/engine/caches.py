"""Caches of which nothing is computed yet, in every type that a graph has them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

#: Element types of caches as ONNX Runtime spells them; of bfloat16, which numpy has no type for, the bits.
CACHE_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
}


def empty_cache(shape: Sequence[int], kind: str) -> onnxruntime.OrtValue:
    """Zeros of an ONNX Runtime type such as ``tensor(float16)``, on the CPU."""
    zeros = np.zeros(shape, CACHE_TYPES[kind])
    if kind == "tensor(bfloat16)":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
