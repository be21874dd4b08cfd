"""The calibration text on its way through the model, twice: by the original and by the quantized model.

Hessians are measured on the quantized stream, whose activations the linears will see in the finished bundle; the
original stream tells what their outputs ought to be. Both are kept in files and read a few sequences at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from glmexport.architecture.description import DecoderLayer, Linear, ResidualBranch
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.goal import stream_difference
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.largest import SeenByBatch
from glmexport.quantization.moments import Measured, Moments
from glmexport.quantization.ranks import Parcel
from glmexport.quantization.store import Activations
from glmexport.reference.reference import Block, Substitute

QUANTIZED, ORIGINAL = "quantized", "original"
#: The hidden states after a step by the name of their stream: computed as they are read, or in a file already.
Hidden = dict[str, Iterator[Tensor] | Activations]
#: The first and last sequence of a batch, and a function from them to hidden states [sequences, length, features].
Batch = tuple[int, int]
Compute = Callable[[int, int], Tensor]


class Streams:
    """The streams of one walk, committed to its work directory with each of its steps."""

    def __init__(self, job: QuantizationJob) -> None:
        calibration, asymmetric = job.calibration, job.recipe.solver.asymmetric
        assert calibration is not None
        self.reference = job.calibrated_reference()
        self.calibration = calibration
        #: Whether moments are of inputs rounded to bf16.
        self.coarse_moments = job.arithmetic.coarse_moments
        self.work = job.work
        self.ranks = job.ranks
        self.names = (QUANTIZED, ORIGINAL) if asymmetric and bool(calibration.selection.any()) else (QUANTIZED,)
        self.positions = self.reference.position_embeddings(calibration.ids.shape[1])
        self._batch = max(1, job.memory.batch_tokens // calibration.ids.shape[1])

    @property
    def asymmetric(self) -> bool:
        """Whether the original's stream is kept too."""
        return ORIGINAL in self.names

    def embedded(self, table: QuantizedLinear | None) -> Hidden:
        """Return what the first block reads."""

        def looked_up(name: str) -> Compute:
            lookup = table if name == QUANTIZED else None

            def rows(start: int, stop: int) -> Tensor:
                ids = self.calibration.ids[start:stop]
                return self.reference.embed(ids) if lookup is None else lookup.lookup(ids)

            return rows

        return {name: self.collected(looked_up(name)) for name in self.names}

    def enter(self, before: str, layer: DecoderLayer) -> Passage:
        """Begin with the block that reads the activations committed with step ``before``."""
        return Passage(self, before, layer)

    def measure_head(self, before: str, head: Linear) -> Measured:
        """Measure the input of the lm_head, after the final norm."""
        into, seen = self.moments((head,), None), SeenByBatch(self.ranks)
        streams = {name: self.committed(before, name) for name in self.names}

        def normed(batch: Batch) -> Parcel:
            stream = streams[QUANTIZED].read(*batch)
            ours = self.reference.final_norm(stream)
            seen.see(batch, (stream, self.reference.architecture.final_norm.key), (ours, head.key))
            theirs = self.reference.final_norm(streams[ORIGINAL].read(*batch)) if self.asymmetric else None
            return Parcel((ours, theirs))

        self.accumulate(into, normed)
        return into.result(seen.take())

    def moments(self, linears: tuple[Linear, ...], weight: Tensor | None) -> Moments:
        """Return empty moments of what ``linears`` read; ``weight`` as for ``Moments``."""
        return Moments(
            self.calibration,
            linears,
            asymmetric=self.asymmetric,
            weight=weight,
            device=self.reference.device,
            coarse=self.coarse_moments,
            ranks=self.ranks,
        )

    def accumulate(self, into: Moments, compute: Callable[[Batch], Parcel]) -> None:
        """Add what ``compute`` gives for every batch: the inputs of the linears, and what is wanted, if anything."""
        for (start, _), parcel in self.ranks.each(self.batches, compute):
            inputs, wanted = parcel.tensors
            assert inputs is not None
            into.add(start, inputs, wanted)

    def collected(self, compute: Compute) -> Iterator[Tensor]:
        """Yield hidden states on rank 0, batch after batch; on the others nothing, which have to run through it too.

        Each batch is computed, from its first and last sequence, by the rank that owns it.
        """
        for _, parcel in self.ranks.collect(self.batches, lambda batch: Parcel((compute(*batch),))):
            (states,) = parcel.tensors
            assert states is not None
            yield states

    @property
    def batches(self) -> list[Batch]:
        """The batches of the text in order; item i of a list of work belongs to the same rank everywhere."""
        count = len(self.calibration.languages)
        return [(start, min(start + self._batch, count)) for start in range(0, count, self._batch)]

    @property
    def own(self) -> Sequence[Batch]:
        """The batches that this rank owns, the only ones that it finds in its scratch files."""
        return self.ranks.own(self.batches)

    def committed(self, step: str, name: str) -> Activations:
        """Return the stream ``name`` as it was committed with ``step``."""
        shape = self.shape(self.reference.architecture.hidden_size)
        return self.work.activations(step, name, shape, self.reference.device)

    def scratch(self, name: str, features: int) -> Activations:
        """Return activations of this walk that belong to no step, for the batches that this rank owns."""
        mine = name if self.ranks.alone else f"{name}.rank_{self.ranks.rank}"
        return self.work.scratch(mine, self.shape(features), self.reference.device)

    def whole(self, name: str, part: Activations) -> Activations:
        """Return scratch activations of all batches, of which ``part`` has those that this rank owns."""
        if self.ranks.alone:
            return part
        whole = self.work.scratch(name, part.shape, part.device)
        start = 0
        for states in self.collected(part.read):
            whole.write(start, states)
            start += len(states)
        self.ranks.barrier()
        return whole

    def shape(self, features: int) -> tuple[int, int, int]:
        """Return the shape of activations with so many features."""
        sequences, length = self.calibration.ids.shape
        return sequences, length, features


class Passage:
    """The streams inside one block, whose linears are quantized tap after tap; nothing is computed twice.

    A branch of the block waits with the input of its last linear (``_inner``) until that is quantized; then its output
    is added to the residual stream. The original's stream need not wait.
    """

    def __init__(self, streams: Streams, before: str, layer: DecoderLayer) -> None:
        self.streams = streams
        self.layer = layer
        self.residual = {name: streams.committed(before, name) for name in streams.names}
        self._inner: tuple[ResidualBranch, Activations] | None = None

    def measure(self, tap: str, substitute: Substitute) -> Measured:
        """Measure ``tap``; taps are measured in the order in which data passes them."""
        seen = SeenByBatch(self.streams.ranks)
        goal, passed = self._enter(tap, substitute, seen)
        into = self.streams.moments(self.layer.taps[tap], goal.weight if goal else None)
        self.streams.accumulate(into, passed)
        self._leave(tap, goal)
        return into.result(seen.take())

    def pass_by(self, tap: str, substitute: Substitute) -> None:
        """Take the text past ``tap``, which was quantized before: as far as ``measure`` does, without measuring."""
        if self.layer.branch(tap).output not in self.layer.taps[tap]:
            # What comes next is computed from the stream again.
            self._move_on_from(tap, substitute)
            return
        goal, passed = self._enter(tap, substitute, SeenByBatch(self.streams.ranks))
        for batch in self.streams.own:
            passed(batch)
        self._leave(tap, goal)

    def _enter(
        self, tap: str, substitute: Substitute, seen: SeenByBatch
    ) -> tuple[_OriginalOutput | None, Callable[[Batch], Parcel]]:
        """Return the goal of ``tap``, and a function that takes a batch there and keeps what waits."""
        self._move_on_from(tap, substitute)
        branch, linears = self.layer.branch(tap), self.layer.taps[tap]
        inner = self._inner_file(linears[0]) if branch.output in linears else None
        block = self.block(tap, substitute)
        goal = _OriginalOutput(self, tap) if self.streams.asymmetric else None

        def passed(batch: Batch) -> Parcel:
            stream = self.residual[QUANTIZED].read(*batch)
            ours = block.branch_tap(tap, stream, self.streams.positions)
            seen.see(batch, (stream, branch.input_norm.key), (ours, linears[0].key))
            if inner is not None:
                inner.write(batch[0], ours)
            return Parcel((ours, goal(*batch, stream) if goal else None))

        return goal, passed

    def _leave(self, tap: str, goal: _OriginalOutput | None) -> None:
        """Let the branch wait if ``tap`` is the input of its last linear."""
        branch, linears = self.layer.branch(tap), self.layer.taps[tap]
        if branch.output in linears:
            self._inner = branch, self._inner_file(linears[0])
            if goal:
                self.residual[ORIGINAL] = goal.moved

    def _move_on_from(self, tap: str, substitute: Substitute) -> None:
        """Leave the branch that waits, if ``tap`` is of another."""
        if self._inner is not None and self.layer.branch(tap) != self._inner[0]:
            self.move_on(substitute)

    def move_on(self, substitute: Substitute) -> None:
        """Take the quantized stream through the branch that waits."""
        assert self._inner is not None
        moved = self.stream_file(QUANTIZED, self._inner[0])
        joined = self._joined(substitute)
        for start, stop in self.streams.own:
            moved.write(start, joined(start, stop))
        self.residual[QUANTIZED], self._inner = moved, None

    def outputs(self, substitute: Substitute) -> Hidden:
        """Return what the next block reads; a block of which nothing was measured is computed whole."""
        streams = self.streams
        if self._inner is None:
            return {name: streams.collected(self._whole(name)) for name in streams.names}
        joined: Hidden = {QUANTIZED: streams.collected(self._joined(substitute))}
        if not streams.asymmetric:
            return joined
        original = self.residual[ORIGINAL]
        return {**joined, ORIGINAL: original if streams.ranks.alone else streams.collected(original.read)}

    def _whole(self, name: str) -> Compute:
        """Return a function to the stream after a block that keeps its weights."""
        block = self.streams.reference.block(self.layer)
        return lambda start, stop: block.forward(self.residual[name].read(start, stop), self.streams.positions)

    def _joined(self, substitute: Substitute) -> Compute:
        """Return a function to the quantized stream after the branch that waits."""
        assert self._inner is not None
        branch, inner = self._inner
        assert branch.output is not None
        block = self.streams.reference.block(self.layer, substitute, only={branch.output.tap})
        before = self.residual[QUANTIZED]

        def joined(start: int, stop: int) -> Tensor:
            return block.add(branch, before.read(start, stop), block.output(branch, inner.read(start, stop)))

        return joined

    def block(self, tap: str, substitute: Substitute | None, *, with_tap: bool = False) -> Block:
        """Return the block with the linears between the stream and ``tap``, and if asked with those of the tap."""
        inside = [name for name in self.layer.taps if self.layer.branch(name) == self.layer.branch(tap)]
        stop = inside.index(tap) + with_tap
        return self.streams.reference.block(self.layer, substitute, only=inside[:stop])

    def _inner_file(self, output: Linear) -> Activations:
        # One file serves all branches: the branch before has moved the stream on by then.
        return self.streams.scratch("inner", output.in_features)

    def stream_file(self, name: str, branch: ResidualBranch) -> Activations:
        """Return the file of the stream ``name`` after ``branch``; the same file in every block, written anew."""
        hidden = self.streams.reference.architecture.hidden_size
        return self.streams.scratch(f"{self.layer.branches.index(branch)}.{name}", hidden)


class _OriginalOutput:
    """A function to the wanted input of a tap's linears, or output of a branch's last one, on the original's stream."""

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
        #: The weight of the branch's last linear, if the tap is its input: then its output is wanted.
        self.weight = self._block.weight(output.weight) if ends else None
        #: The original's stream after the branch, as far as it is known.
        self.moved = passage.stream_file(ORIGINAL, self._branch)

    def __call__(self, start: int, stop: int, stream: Tensor) -> Tensor:
        """Return that for sequences ``start`` to ``stop``; the branch adds to the quantized model's ``stream``."""
        original = self._residual.read(start, stop)
        theirs = self._block.branch_tap(self._tap, original, self._streams.positions)
        if self.weight is None:
            return theirs
        output = self._block.output(self._branch, theirs)
        self.moved.write(start, self._block.add(self._branch, original, output))
        return stream_difference(output, stream, original, self._gain, self._epsilon).add_(output)
