"""Scales of a quantized cache, calibrated on what the exported graph itself caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from glmexport.architecture.description import Architecture, DecoderLayer, Rotary
from glmexport.bundle.names import ATTENTION_MASK, BLOCK_NAME, INPUT_IDS, PRESENT
from glmexport.engine.core.cache import UnkeptCaches, run_graph, unkept_specs
from glmexport.foundation.progress import Progress
from glmexport.foundation.target import GraphLimits
from glmexport.lowering.attention import CACHE_BITS, CACHE_SCALE

Array = NDArray[np.float32]
#: Room that a channel's scale leaves above the largest magnitude that was seen: of one channel little text is seen.
#: With 4,096 tokens of calibration text it more than halves the divergence that int8 adds to the demo.
_HEADROOM = np.float32(1.2)
#: Shares of the largest magnitude that the largest 4-bit code may stand for.
_CLIPS = np.linspace(0.5, 1.0, 11, dtype=np.float32)
#: Radians between the angles that are tried one after the other: the golden angle, which visits all evenly.
_GOLDEN = 2.399963229728653


@dataclass(frozen=True)
class Rotation:
    """Which channels of a head the rotary embedding turns as a pair: ``first[i]`` with ``second[i]``."""

    first: tuple[int, ...]
    second: tuple[int, ...]


def rotation_of(rotary: Rotary) -> Rotation:
    """That of cached keys, whose first dimensions are rotated in every kind of attention."""
    size = rotary.dimensions
    if rotary.interleaved:
        return Rotation(tuple(range(0, size, 2)), tuple(range(1, size, 2)))
    return Rotation(tuple(range(size // 2)), tuple(range(size // 2, size)))


def calibrate_caches(
    graph: Path, architecture: Architecture, limits: GraphLimits, sequences: Sequence[Sequence[int]], progress: Progress
) -> dict[str, Array]:
    """Scales by the name of their initializer, for every layer's keys and values.

    1. ``graph`` caches floats. It runs on the CPU provider, so keys are those behind the rotary embedding, in the
       arithmetic of the bundle.
    2. A scale is the largest magnitude over the largest code, with some room for channels. A pair of channels that is
       rotated has one: its radius, which no position changes, so that positions beyond the calibration text's fit too.
    3. With 4 bits, of eleven shares of that the one with the least squared error; pairs are judged at all angles.

    Args:
        graph: model.onnx of the same bundle with float caches.
        architecture: of the bundle.
        limits: of the target: bits, and whether each channel has a scale.
        sequences: token ids of calibration text.
        progress: who watches.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    gauges = CacheGauges(architecture.layers, limits)
    with progress.track("Calibrating the cache", len(sequences) * gauges.passes) as track:
        for turn in range(gauges.passes):
            for ids in sequences:
                gauges.see(turn, _cached(session, ids, gauges.outputs))
                track.advance()
    return gauges.scales()


class CacheGauges:
    """What is found out of the caches of some layers, over ``passes`` over the same text."""

    def __init__(self, layers: Sequence[DecoderLayer], limits: GraphLimits) -> None:
        self._layers = layers
        self._by_channel = limits.kv_scales == "channel"
        levels = 2 ** (CACHE_BITS[limits.kv_cache] - 1) - 1
        self._gauges = {
            PRESENT.format(layer=layer.index, kind=kind): _Gauge(
                rotation_of(layer.attention.rotary) if kind == "key" else Rotation((), ()), levels
            )
            for layer in layers
            for kind in ("key", "value")
        }
        self.passes = 2 if limits.kv_cache == "int4" else 1

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs that ``see`` takes, in this order."""
        return list(self._gauges)

    def see(self, turn: int, caches: Iterable[Array]) -> None:
        """Keys or values [heads, length, size] of every output, in the pass ``turn``."""
        for gauge, cached in zip(self._gauges.values(), caches, strict=True):
            (gauge.widen, gauge.compare)[turn](cached)

    def scales(self) -> dict[str, Array]:
        """By the name of their initializer, after all passes."""
        scales = {}
        for layer in self._layers:
            for kind in ("key", "value"):
                steps = self._gauges[PRESENT.format(layer=layer.index, kind=kind)].scales()
                name = CACHE_SCALE.format(block=BLOCK_NAME.format(layer=layer.index), kind=kind)
                scales[name] = _HEADROOM * steps[:, None] if self._by_channel else steps.max(keepdims=True).reshape(1)
        return scales


def set_scales(model: ir.Model, scales: dict[str, Array]) -> None:
    """Put calibrated scales in the place of the ones that the lowering wrote."""
    for name, scale in scales.items():
        value = model.graph.initializers[name]
        assert value.shape == ir.Shape(scale.shape), name
        value.const_value = ir.tensor(scale, name=name)


def _cached(session: onnxruntime.InferenceSession, ids: Sequence[int], names: list[str]) -> Iterator[Array]:
    """Yield the keys or values [heads, length, size] of every name, after ``ids`` from an empty cache."""
    given = {INPUT_IDS: np.array([ids], np.int64), ATTENTION_MASK: np.ones((1, len(ids)), np.int64)}
    caches = UnkeptCaches(unkept_specs(session, given), 1)
    caches.reserve(len(ids))
    for cached in run_graph(session, given, names, caches):
        yield cached[0].astype(np.float32)


class _Gauge:
    """One cache: the largest magnitude of every channel, and the error of each clip."""

    def __init__(self, rotation: Rotation, levels: int) -> None:
        self._first, self._second = list(rotation.first), list(rotation.second)
        self._levels = levels
        #: [heads, size]
        self._largest = np.zeros((1, 1), np.float32)
        #: [clips, heads, size]
        self._errors: NDArray[np.float64] | None = None

    def widen(self, cached: Array) -> None:
        magnitudes = np.abs(cached).max(axis=1)
        if self._first:
            radii = np.hypot(cached[..., self._first], cached[..., self._second]).max(axis=1)
            magnitudes[:, self._first] = magnitudes[:, self._second] = radii
        self._largest = np.maximum(self._largest, magnitudes)

    def compare(self, cached: Array) -> None:
        if self._first:
            radii = np.hypot(cached[..., self._first], cached[..., self._second])
            angles = (_GOLDEN * np.arange(cached.shape[1], dtype=np.float32))[:, None]
            cached = cached.copy()
            cached[..., self._first], cached[..., self._second] = radii * np.cos(angles), radii * np.sin(angles)
        if self._errors is None:
            self._errors = np.zeros((len(_CLIPS), *self._largest.shape))
        for index, clip in enumerate(_CLIPS):
            step = self._steps(clip)[:, None]
            codes = np.clip(np.rint(cached / step), -self._levels - 1, self._levels)
            self._errors[index] += np.square(codes * step - cached, dtype=np.float64).sum(axis=1)

    def scales(self) -> Array:
        """Steps [heads, size]."""
        if self._errors is None:
            return self._steps(np.float32(1))
        errors = self._errors
        if self._first:
            both = errors[..., self._first] + errors[..., self._second]
            errors[..., self._first] = errors[..., self._second] = both
        clips: Array = _CLIPS[errors.argmin(axis=0)]
        return clips * self._steps(np.float32(1))

    def _steps(self, clip: np.float32) -> Array:
        # A channel that was never anything but zero still needs a step.
        return np.asarray(np.maximum(self._largest * clip / np.float32(self._levels), np.finfo(np.float32).tiny))
