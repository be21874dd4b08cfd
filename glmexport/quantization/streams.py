"""Calibration text on its way through the model, twice: as the original computes it and as the quantized model does.

Hessians are measured on the quantized stream, whose activations the linears will see in the finished bundle; the
original stream says what their outputs ought to be. Both are kept in files and read a few sequences at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from glmexport.architecture.description import DecoderLayer, Linear, ResidualBranch
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.goal import stream_difference
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.largest import Largest
from glmexport.quantization.moments import Measured, Moments
from glmexport.quantization.store import Activations
from glmexport.reference.reference import Block, Substitute

QUANTIZED, ORIGINAL = "quantized", "original"
#: Hidden states behind a step by the name of their stream: computed as they are read, or in a file already.
Hidden = dict[str, Iterator[Tensor] | Activations]


class Streams:
    """The streams of one walk, committed to its work directory with each of its steps."""

    def __init__(self, job: QuantizationJob) -> None:
        calibration, asymmetric = job.calibration, job.recipe.solver.asymmetric
        assert calibration is not None
        self.reference = job.reference()
        self.calibration = calibration
        self.work = job.work
        self.names = (QUANTIZED, ORIGINAL) if asymmetric and bool(calibration.selection.any()) else (QUANTIZED,)
        self.positions = self.reference.position_embeddings(calibration.ids.shape[1])
        self._batch = max(1, job.memory.batch_tokens // calibration.ids.shape[1])

    @property
    def asymmetric(self) -> bool:
        """Whether the original's stream is kept too."""
        return ORIGINAL in self.names

    def embedded(self, table: QuantizedLinear | None) -> Hidden:
        """Return what the first block reads."""

        def rows(lookup: QuantizedLinear | None) -> Iterator[Tensor]:
            for start, stop in self.batches():
                ids = self.calibration.ids[start:stop]
                yield self.reference.embed(ids) if lookup is None else lookup.lookup(ids)

        return {name: rows(table if name == QUANTIZED else None) for name in self.names}

    def enter(self, before: str, layer: DecoderLayer) -> Passage:
        """Begin with the block that reads the activations committed with step ``before``."""
        return Passage(self, before, layer)

    def measure_head(self, before: str, head: Linear) -> Measured:
        """Measure the input of the lm_head, behind the final norm."""
        into, largest = self.moments((head,), None), Largest()
        streams = {name: self.committed(before, name) for name in self.names}
        for start, stop in self.batches():
            stream = streams[QUANTIZED].read(start, stop)
            ours = self.reference.final_norm(stream)
            largest.see(stream, self.reference.architecture.final_norm.key)
            largest.see(ours, head.key)
            theirs = None
            if self.asymmetric:
                theirs = self.reference.final_norm(streams[ORIGINAL].read(start, stop))
            into.add(start, ours, theirs)
        return into.result(largest.take())

    def moments(self, linears: tuple[Linear, ...], weight: Tensor | None) -> Moments:
        """Return empty moments of what ``linears`` read; ``weight`` as for ``Moments``."""
        device = self.reference.device
        return Moments(self.calibration, linears, asymmetric=self.asymmetric, weight=weight, device=device)

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yield the first and last sequence of every batch."""
        count = len(self.calibration.languages)
        for start in range(0, count, self._batch):
            yield start, min(start + self._batch, count)

    def committed(self, step: str, name: str) -> Activations:
        """Return the stream ``name`` as it was committed with ``step``."""
        shape = self.shape(self.reference.architecture.hidden_size)
        return self.work.activations(step, name, shape, self.reference.device)

    def scratch(self, name: str, features: int) -> Activations:
        """Return activations of this walk that belong to no step."""
        return self.work.scratch(name, self.shape(features), self.reference.device)

    def shape(self, features: int) -> tuple[int, int, int]:
        """Return the shape of activations with so many features."""
        sequences, length = self.calibration.ids.shape
        return sequences, length, features


class Passage:
    """The streams inside one block, whose linears are quantized tap after tap; nothing is computed twice.

    A branch of the block waits with what its last linear reads (``_inner``) until that is quantized; then what it
    adds moves the residual stream on. The original's stream need not wait.
    """

    def __init__(self, streams: Streams, before: str, layer: DecoderLayer) -> None:
        self.streams = streams
        self.layer = layer
        self.residual = {name: streams.committed(before, name) for name in streams.names}
        self._inner: tuple[ResidualBranch, Activations] | None = None

    def measure(self, tap: str, substitute: Substitute) -> Measured:
        """Measure ``tap``; taps are measured in the order in which data passes them."""
        branch, linears = self.layer.branch(tap), self.layer.taps[tap]
        if self._inner is not None and branch != self._inner[0]:
            self.move_on(substitute)
        asymmetric = self.streams.asymmetric
        inner = self._inner_file(linears[0]) if branch.output in linears else None
        block = self.block(tap, substitute)
        goal = _OriginalOutput(self, tap) if asymmetric else None
        into, largest = self.streams.moments(linears, goal.weight if goal else None), Largest()
        for start, stop in self.streams.batches():
            stream = self.residual[QUANTIZED].read(start, stop)
            ours = block.branch_tap(tap, stream, self.streams.positions)
            largest.see(stream, branch.input_norm.key)
            largest.see(ours, linears[0].key)
            into.add(start, ours, goal(start, stop, stream) if goal else None)
            if inner is not None:
                inner.write(start, ours)
        if inner is not None:
            self._inner = branch, inner
            if goal:
                self.residual[ORIGINAL] = goal.moved
        return into.result(largest.take())

    def move_on(self, substitute: Substitute) -> None:
        """Take the quantized stream behind the branch that waits."""
        assert self._inner is not None
        moved = self.stream_file(QUANTIZED, self._inner[0])
        for (start, _), states in zip(self.streams.batches(), self._joined(substitute), strict=True):
            moved.write(start, states)
        self.residual[QUANTIZED], self._inner = moved, None

    def outputs(self, substitute: Substitute) -> Hidden:
        """Return what the next block reads. A block of which nothing was measured is computed whole."""
        if self._inner is None:
            return {name: self._whole(name) for name in self.streams.names}
        joined: Hidden = {QUANTIZED: self._joined(substitute)}
        return {**joined, ORIGINAL: self.residual[ORIGINAL]} if self.streams.asymmetric else joined

    def _whole(self, name: str) -> Iterator[Tensor]:
        """Through a block that keeps its weights."""
        block = self.streams.reference.block(self.layer)
        for start, stop in self.streams.batches():
            yield block.forward(self.residual[name].read(start, stop), self.streams.positions)

    def _joined(self, substitute: Substitute) -> Iterator[Tensor]:
        """The quantized stream behind the branch that waits."""
        assert self._inner is not None
        branch, inner = self._inner
        assert branch.output is not None
        block = self.streams.reference.block(self.layer, substitute, only={branch.output.tap})
        for start, stop in self.streams.batches():
            output = block.output(branch, inner.read(start, stop))
            yield block.add(branch, self.residual[QUANTIZED].read(start, stop), output)

    def block(self, tap: str, substitute: Substitute | None, *, with_tap: bool = False) -> Block:
        """Return the block with the linears between the stream and ``tap``, and if asked with those of the tap."""
        inside = [name for name in self.layer.taps if self.layer.branch(name) == self.layer.branch(tap)]
        stop = inside.index(tap) + with_tap
        return self.streams.reference.block(self.layer, substitute, only=inside[:stop])

    def _inner_file(self, output: Linear) -> Activations:
        # One for all branches: the one before has moved the stream on by then.
        return self.streams.scratch("inner", output.in_features)

    def stream_file(self, name: str, branch: ResidualBranch) -> Activations:
        """Return the file of the stream ``name`` behind ``branch``; the same file in every block, written anew."""
        hidden = self.streams.reference.architecture.hidden_size
        return self.streams.scratch(f"{self.layer.branches.index(branch)}.{name}", hidden)


class _OriginalOutput:
    """Computes what the linears of a tap should read, or the last one of a branch give, for the original's stream."""

    def __init__(self, passage: Passage, tap: str) -> None:
        self._streams = passage.streams
        self._residual = passage.residual[ORIGINAL]
        self._tap = tap
        self._branch = passage.layer.branch(tap)
        output = self._branch.output
        assert output is not None
        ends = output.tap == tap
        self._block = passage.block(tap, None, with_tap=ends)
        norm = self._branch.output_norm
        self._gain = None if norm is None else self._streams.reference.read(norm.weight)
        self._epsilon = 0.0 if norm is None else norm.epsilon
        #: Of the branch's last linear, if the tap is its: then its output is what is wanted.
        self.weight = self._block.weight(output.weight) if ends else None
        #: The original's stream behind the branch, as far as it is known.
        self.moved = passage.stream_file(ORIGINAL, self._branch)

    def __call__(self, start: int, stop: int, stream: Tensor) -> Tensor:
        """Return it for sequences ``start`` to ``stop``; the branch adds to the quantized model's ``stream``."""
        original = self._residual.read(start, stop)
        theirs = self._block.branch_tap(self._tap, original, self._streams.positions)
        if self.weight is None:
            return theirs
        output = self._block.output(self._branch, theirs)
        self.moved.write(start, self._block.add(self._branch, original, output))
        return stream_difference(output, stream, original, self._gain, self._epsilon).add_(output)
