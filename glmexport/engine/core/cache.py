"""The caches of a graph: their kinds, their memory, and the one way to run a graph with them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

#: The numpy type for each type of cache; numpy has no bfloat16, so it has the type of its bits.
CACHE_TYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}
#: The sizes of a cache that a sequence decides; every other size is a number. On the axis of positions
#: ``past_sequence`` says that the output is the input with the new positions after it, and ``capacity`` that new
#: positions are written into a buffer that is both.
BATCH, PAST_SEQUENCE, CAPACITY = "batch", "past_sequence", "capacity"
_NAMES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
}
#: The number of the type in ONNX.
_BFLOAT16 = 16


@dataclass(frozen=True)
class CacheSpec:
    """One cache of a graph: its input, the output that follows it, its shape, and its type in ``CACHE_TYPES``.

    The shape has numbers and the names of sizes above. It is fixed if no size of it is named after positions.
    """

    input: str
    output: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def axis(self) -> int | None:
        """The axis of positions; None where the shape is fixed."""
        return next((at for at, size in enumerate(self.shape) if size in (PAST_SEQUENCE, CAPACITY)), None)

    @property
    def grows(self) -> bool:
        """Whether the graph returns the cache longer than it was given it."""
        return PAST_SEQUENCE in self.shape

    def empty(self, batch: int, positions: int) -> onnxruntime.OrtValue:
        """Return zeros on the CPU for ``batch`` sequences of ``positions`` each."""
        sizes: dict[int | str, int] = {BATCH: batch, PAST_SEQUENCE: positions, CAPACITY: positions}
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        return self.value(np.zeros(shape, CACHE_TYPES[self.dtype]))

    def value(self, array: NDArray[Any]) -> onnxruntime.OrtValue:
        """Return a value over the memory of ``array``, which has to be contiguous."""
        if self.dtype == "bfloat16":
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: onnxruntime.OrtValue) -> NDArray[Any]:
        """Return the memory of a ``value`` of this cache, which has to outlive the array."""
        shape, dtype = value.shape(), CACHE_TYPES[self.dtype]
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return np.zeros(shape, dtype)
        return np.frombuffer((ctypes.c_char * size).from_address(value.data_ptr()), dtype).reshape(shape)

    def first(self, positions: int) -> tuple[slice, ...]:
        """Return the index of the first ``positions``."""
        return tuple(slice(positions if at == self.axis else None) for at in range(len(self.shape)))


def cache_specs(session: onnxruntime.InferenceSession, outputs: Mapping[str, str]) -> tuple[CacheSpec, ...]:
    """Return the caches of a graph, of which ``outputs`` names the output by the input."""
    return tuple(
        CacheSpec(value.name, outputs[value.name], tuple(value.shape), _NAMES[value.type])
        for value in session.get_inputs()
        if value.name in outputs
    )


def unkept_specs(session: onnxruntime.InferenceSession, given: Collection[str]) -> tuple[CacheSpec, ...]:
    """Return the caches of a graph, which are all inputs but those ``given``, for runs that do not keep them."""
    names = [value.name for value in session.get_inputs() if value.name not in given]
    return cache_specs(session, dict.fromkeys(names, ""))


class Caches(Protocol):
    """The caches of sequences that are computed in one run."""

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions of each sequence."""
        ...

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind the caches to the next run, after its other outputs."""
        ...

    def take(self, values: Sequence[onnxruntime.OrtValue]) -> None:
        """Take what the run gave for the caches."""
        ...


class KeptCaches(Caches, Protocol):
    """The caches from which positions can be removed again."""

    def cut(self, length: int) -> None:
        """Let only the first ``length`` positions count."""
        ...


def run_graph(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    caches: Caches,
) -> list[NDArray[Any]]:
    """Run a graph once with its caches, and return its ``outputs``."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name in outputs:
        binding.bind_output(name, "cpu")
    caches.bind(binding)
    session.run_with_iobinding(binding)
    values = binding.get_outputs()
    caches.take(values[len(outputs) :])
    return [value.numpy() for value in values[: len(outputs)]]


class CacheRows:
    """Buffers each of which is the input and the output of a graph, so that no step copies any.

    They belong to neighbouring sequences of ``SharedCaches``, in which their room is reserved.
    """

    def __init__(self, specs: Sequence[CacheSpec]) -> None:
        self._specs = specs
        self._values: dict[str, onnxruntime.OrtValue] = {}

    def reserve(self, length: int) -> None:
        """Do nothing: the room is reserved in ``SharedCaches``."""

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind every buffer as input and as output."""
        for spec in self._specs:
            value = self._values[spec.input]
            binding.bind_ortvalue_input(spec.input, value)
            binding.bind_ortvalue_output(spec.output, value)

    def take(self, values: Sequence[onnxruntime.OrtValue]) -> None:
        """Do nothing: the run has written into the buffers."""

    def cut(self, length: int) -> None:
        """Do nothing: positions after those that count are written over."""


class SharedCaches(CacheRows):
    """The buffers of all sequences, which grow by ``step`` positions up to ``limit``, so that little is empty."""

    def __init__(self, specs: Sequence[CacheSpec], batch: int, step: int, limit: int) -> None:
        super().__init__(specs)
        self._batch = batch
        self._step = step
        self._limit = limit
        #: Number of positions that there is room for.
        self.capacity = 0
        self._rows: dict[tuple[int, int], CacheRows] = {}

    @property
    def bytes(self) -> int:
        """The bytes of all buffers."""
        return sum(spec.array(self._values[spec.input]).nbytes for spec in self._specs if self._values)

    def reserve(self, length: int) -> None:
        """Make the buffers longer if they have no room for ``length`` positions; what they hold stays."""
        if length <= self.capacity:
            return
        self.capacity = min(-(-length // self._step) * self._step, self._limit)
        for spec in self._specs:
            grown = spec.empty(self._batch, self.capacity)
            if spec.input in self._values and spec.axis is not None:
                held = spec.array(self._values[spec.input])
                spec.array(grown)[spec.first(held.shape[spec.axis])] = held
            self._values[spec.input] = grown
        self._rows.clear()

    def rows(self, first: int, count: int) -> CacheRows:
        """Return the buffers of ``count`` of the sequences from ``first`` on, which are right until these grow."""
        found = self._rows.get((first, count))
        if found is None:
            found = self._rows[first, count] = CacheRows(self._specs)
            for spec in self._specs:
                part = spec.array(self._values[spec.input])[first : first + count]
                found._values[spec.input] = spec.value(part)
        return found


class GrowingCaches:
    """Caches that a graph returns longer than it was given them, and that begin empty."""

    def __init__(self, specs: Sequence[CacheSpec], batch: int) -> None:
        self._specs = specs
        self._values = {spec.input: spec.empty(batch, 0) for spec in specs}

    def reserve(self, length: int) -> None:
        """Do nothing: the graph makes the room."""

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind the caches as inputs, and let the run allocate the longer ones."""
        for spec in self._specs:
            binding.bind_ortvalue_input(spec.input, self._values[spec.input])
            binding.bind_output(spec.output, "cpu")

    def take(self, values: Sequence[onnxruntime.OrtValue]) -> None:
        """Keep the longer caches in the place of the former."""
        self._values = {spec.input: value for spec, value in zip(self._specs, values)}

    def cut(self, length: int) -> None:
        """Copy the first ``length`` positions."""
        self._values = {
            spec.input: spec.value(spec.array(self._values[spec.input])[spec.first(length)].copy())
            for spec in self._specs
        }


class UnkeptCaches:
    """The empty caches of one run over whole texts, of which nothing is kept."""

    def __init__(self, specs: Sequence[CacheSpec], batch: int) -> None:
        self._specs = specs
        self._batch = batch
        self._length = 0
        #: The values whose memory the run reads.
        self._values: list[onnxruntime.OrtValue] = []

    def reserve(self, length: int) -> None:
        """Note the room that a cache of a capacity needs; one that grows begins empty."""
        self._length = length

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind empty caches as inputs alone."""
        self._values = [spec.empty(self._batch, 0 if spec.grows else self._length) for spec in self._specs]
        for spec, value in zip(self._specs, self._values):
            binding.bind_ortvalue_input(spec.input, value)

    def take(self, values: Sequence[onnxruntime.OrtValue]) -> None:
        """Do nothing: nothing is kept."""
