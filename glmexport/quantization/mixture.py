"""A mixture of experts on its way through the walk: each expert measured on the positions that chose it.

Routing is the model's own, on each stream. One expert's weights and one Hessian are in memory at a time: routed experts
do not depend on one another, so that each is measured and quantized by the rank that owns it, and what all of them
give is added up afterwards in their order.

A Hessian of few positions says little of most directions. It is shrunk toward what the expert would read if every
position chose it (``pooled``): H = (n H_e + p H_pool) / (n + p), where n is the number of positions that its own are
worth, and p, what the pool is worth, a fixed share of the number of columns.

The shared expert comes last: every position passes it, so that it is fitted to what the routed ones leave of the way to
the original's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.calibration.hessian import Hessian
from glmexport.calibration.sequences import effective_count
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.goal import Sample
from glmexport.quantization.largest import Seen, SeenByBatch
from glmexport.quantization.moments import SAMPLE_POSITIONS, Measured, share_slabs
from glmexport.quantization.ranks import ALONE, Parcel, Ranks
from glmexport.quantization.store import Activations
from glmexport.quantization.streams import ORIGINAL, QUANTIZED, Batch, Compute, Hidden, Passage
from glmexport.reference.reference import Block, Reference

#: The weight of the pool in a Hessian, in positions a column.
PRIOR = 1.0
#: Fewest held-out positions of an expert that can choose between solutions.
LEAST_HELD = 64
#: Number of positions on which the pool of the inputs of an expert's last matrix is measured.
POOL_POSITIONS = 2048


@dataclass(frozen=True)
class ExpertShare:
    """The positions [n] int64, counted through all sequences, that an expert gets, and its weights [n] fp32 there."""

    positions: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Routes:
    """The ``experts`` and ``weights`` [positions, chosen] of every position of a stream."""

    experts: Tensor
    weights: Tensor
    largest: Seen | None


@dataclass(frozen=True)
class MeasuredExpert:
    """The moments that one matrix of an expert is solved from, and the number of positions that they rest on."""

    measured: Measured
    #: Number of calibration positions that chose the expert; None if all do.
    chosen: int | None
    #: The effective number of these positions: equally weighted, each different.
    own_tokens: float
    #: The moments, with the pool's part.
    tokens: float


#: An expert, some of the positions that chose it, and its weights there.
_Piece = tuple[GatedMlp, Tensor, Tensor]


class _Opened:
    """The matrices of one expert at a time: as ``solved`` has them, else as the original does."""

    def __init__(self, reference: Reference, solved: Callable[[GatedMlp], dict[str, QuantizedLinear]]) -> None:
        self._reference = reference
        self._solved = solved
        self._mlp: GatedMlp | None = None
        self._matrices: tuple[Tensor, Tensor] | None = None

    def matrices(self, mlp: GatedMlp) -> tuple[Tensor, Tensor]:
        """Return the gate and up projection and the down projection of ``mlp``, fp32 on the device."""
        if self._matrices is None or self._mlp is not mlp:
            self._matrices = None
            solved = self._solved(mlp)
            gate_up, down = (
                solved[linear.weight].dequantize().to(self._reference.device)
                if linear.weight in solved
                else self._reference.read(linear.weight)
                for linear in mlp.linears
            )
            self._mlp, self._matrices = mlp, (gate_up, down)
        return self._matrices


class Mixture:
    """The streams between the router of one layer and the sum of its experts."""

    def __init__(self, passage: Passage, mixture: MixtureOfExperts, batch_tokens: int) -> None:
        self.streams = passage.streams
        self.mixture = mixture
        self.layer = passage.layer
        self.residual = {
            name: self.streams.whole(f"attended.{name}", passage.residual[name]) for name in self.streams.names
        }
        self._branch = self.layer.branches[1]
        self._block: Block = self.streams.reference.block(self.layer, only=())
        self._batch = batch_tokens
        calibration = self.streams.calibration
        length = calibration.ids.shape[1]
        self._held = calibration.selection[:, None].expand(-1, length).flatten()
        counted = torch.arange(length) >= calibration.prefix
        #: The weight of each position, 0 where it does not count.
        self._weights = (calibration.weights()[:, None] * counted).flatten()
        self._contexts = calibration.contexts.flatten()
        #: The positions whose sums this rank keeps.
        self._own = torch.zeros_like(self._held)
        for start, stop in self.streams.own:
            self._own[start * length : stop * length] = True
        self._routes = {name: self._route(name) for name in self.streams.names}
        self._added = {name: self._empty(name) for name in self.streams.names}
        #: The moment of the input of all experts.
        self._pool: Tensor | None = None

    def measure(self, mlp: GatedMlp, linear: Linear, gate_up: QuantizedLinear | None) -> MeasuredExpert:
        """Measure what ``linear`` of ``mlp`` reads; ``gate_up``, as it was quantized, if that lies before it."""
        inside = self._inside(gate_up)
        share = self._share(QUANTIZED, mlp)
        weights = self._weights[share.positions] * share.weights.square()
        fitted = (weights > 0) & ~self._held[share.positions]
        tokens = effective_count(self._contexts[share.positions[fitted]], weights[fitted])
        if mlp is self.mixture.shared:
            return MeasuredExpert(self.measure_shared(mlp, linear, inside), None, tokens, tokens)
        prior = min(PRIOR * linear.in_features, self.streams.calibration.effective_tokens)
        pool = self.pool if gate_up is None else self._pooled(inside, linear)
        own = self._accumulate(share, fitted, weights, inside, linear.in_features)
        hessian = own.mul_(tokens).add_(pool, alpha=prior).div_(tokens + prior)
        sample = self._sample(share, weights, inside)
        return MeasuredExpert(Measured(hessian, sample), int(fitted.sum()), tokens, tokens + prior)

    def measure_shared(self, mlp: GatedMlp, linear: Linear, inside: Callable[[Tensor], Tensor]) -> Measured:
        """Measure all positions; with the original's stream also what the matrix should read, or the last one give."""
        streams, branch, block = self.streams, self._branch, self._block
        product = streams.reference.product
        assert branch.output_norm is None
        ends = linear is mlp.down
        gate_up, down = (streams.reference.read(each.weight) for each in mlp.linears) if ends else (None, None)
        into = streams.moments((linear,), down if streams.asymmetric else None)

        def read(batch: Batch) -> Parcel:
            stream = self.residual[QUANTIZED].read(*batch)
            wanted = None
            if streams.asymmetric:
                theirs = self.residual[ORIGINAL].read(*batch)
                wanted = block.normed(branch, theirs)
                if gate_up is not None and down is not None:
                    added = self._added[ORIGINAL].read(*batch) + product(block.gated(product(wanted, gate_up)), down)
                    ours = block.add(branch, stream, self._added[QUANTIZED].read(*batch))
                    wanted = block.add(branch, theirs, added) - ours
            return Parcel((inside(block.normed(branch, stream)), wanted))

        streams.accumulate(into, read)
        return into.result()

    def add(self, mlps: Sequence[GatedMlp], solved: Callable[[GatedMlp], dict[str, QuantizedLinear]]) -> Seen | None:
        """Let the outputs of ``mlps`` join the streams in order: as ``solved`` in the quantized one, else as they were.

        The result is the largest number that their last matrices read; None if no position chose any.
        """
        seen = SeenByBatch(self.streams.ranks)
        for name in self.streams.names:
            self._add_to(name, mlps, solved if name == QUANTIZED else lambda _: {}, seen)
        return seen.take()

    def _add_to(
        self,
        name: str,
        mlps: Sequence[GatedMlp],
        solved: Callable[[GatedMlp], dict[str, QuantizedLinear]],
        seen: SeenByBatch,
    ) -> None:
        """Add the outputs of ``mlps`` to the sums of one stream, of which each rank keeps those of its positions."""
        opened, product = _Opened(self.streams.reference, solved), self.streams.reference.product
        pieces: list[_Piece] = []
        for mlp in mlps:
            share = self._share(name, mlp)
            pieces += [(mlp, *chunk) for chunk in self._chunks(share.positions, share.weights)]

        def output(number: int) -> Parcel:
            mlp, chosen, weights = pieces[number]
            gate_up, down = opened.matrices(mlp)
            inner = self._block.gated(product(self._read(name, chosen), gate_up))
            if name == QUANTIZED:
                seen.see((number,), (inner, mlp.down.key))
            return Parcel((product(inner, down).mul_(weights[:, None].to(inner.device)),))

        ranks = self.streams.ranks
        for number, parcel in ranks.each(range(len(pieces)), output):
            positions, (rows,) = pieces[number][1], parcel.tensors
            assert rows is not None
            if not ranks.alone:
                mine = self._own[positions]
                positions, rows = positions[mine], rows[mine.to(rows.device)]
            self._added[name].add(positions, rows)

    def cost(self, mlp: GatedMlp) -> float:
        """Return how long it takes to quantize the expert ``mlp``, in no unit: its Hessians, then what all cost."""
        positions = len(self._share(QUANTIZED, mlp).positions)
        return sum(
            (positions + linear.in_features + linear.out_features) * linear.in_features**2 for linear in mlp.linears
        )

    def outputs(self) -> Hidden:
        """Return what the next layer reads."""

        def joined(name: str) -> Compute:
            def states(start: int, stop: int) -> Tensor:
                stream, added = self.residual[name].read(start, stop), self._added[name].read(start, stop)
                return self._block.add(self._branch, stream, added)

            return states

        return {name: self.streams.collected(joined(name)) for name in self.streams.names}

    @property
    def largest(self) -> Seen | None:
        """Return the largest number that the router and its norm read in the quantized model."""
        return self._routes[QUANTIZED].largest

    @property
    def pool(self) -> Tensor:
        """Return the mean of x x^T over all positions that count, [hidden, hidden] fp32."""
        if self._pool is None:
            everywhere = ExpertShare(torch.arange(len(self._weights)), torch.ones(len(self._weights)))
            fitted = (self._weights > 0) & ~self._held
            size = self.streams.reference.architecture.hidden_size
            ranks = self.streams.ranks
            self._pool = self._accumulate(everywhere, fitted, self._weights, lambda inputs: inputs, size, ranks)
        return self._pool

    def share_pool(self) -> None:
        """Measure the pool, which all ranks have to do together."""
        assert self.pool is not None

    def _pooled(self, inside: Callable[[Tensor], Tensor], linear: Linear) -> Tensor:
        """Return the moment of what the last matrix of an expert would read at some positions, whoever chose it."""
        fitted = ((self._weights > 0) & ~self._held).nonzero()[:, 0]
        some = fitted[:: max(1, len(fitted) // POOL_POSITIONS)]
        share, weights = ExpertShare(some, torch.ones(len(some))), self._weights[some]
        return self._accumulate(share, torch.ones(len(some), dtype=torch.bool), weights, inside, linear.in_features)

    def _accumulate(
        self,
        share: ExpertShare,
        fitted: Tensor,
        weights: Tensor,
        inside: Callable[[Tensor], Tensor],
        size: int,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Return the weighted mean of x x^T over the ``fitted`` positions, [size, size] fp32; zero without any."""
        device, coarse = self.streams.reference.device, self.streams.coarse_moments
        hessian = Hessian(size, device, coarse=coarse, rank=ranks.rank, size=ranks.size)
        total = float(weights[fitted].double().sum())
        for chosen, weight in self._chunks(share.positions[fitted], weights[fitted]):
            rows = inside(self._read(QUANTIZED, chosen)).clone()
            hessian.add(rows.mul_((weight / total).sqrt()[:, None].to(rows.device)))
        share_slabs(hessian, ranks)
        return hessian.matrix()

    def _sample(self, share: ExpertShare, weights: Tensor, inside: Callable[[Tensor], Tensor]) -> Sample | None:
        """Return held-out positions that chose the expert, if they are enough to tell anything."""
        held = ((weights > 0) & self._held[share.positions]).nonzero()[:, 0]
        held = held[:: -(-len(held) // SAMPLE_POSITIONS) or 1]
        if len(held) < LEAST_HELD:
            return None
        inputs = [inside(self._read(QUANTIZED, chosen)) for chosen, _ in self._chunks(share.positions[held], held)]
        chosen = weights[held].to(self.streams.reference.device)
        return Sample(torch.cat(inputs), chosen / chosen.sum())

    def _inside(self, gate_up: QuantizedLinear | None) -> Callable[[Tensor], Tensor]:
        """Return a function from what an expert reads to what a matrix of it reads."""
        if gate_up is None:
            return lambda inputs: inputs
        matrix = gate_up.dequantize().to(self.streams.reference.device)
        return lambda inputs: self._block.gated(self.streams.reference.product(inputs, matrix))

    def _share(self, name: str, mlp: GatedMlp) -> ExpertShare:
        experts, weights = self._routes[name].experts, self._routes[name].weights
        if mlp is self.mixture.shared:
            return ExpertShare(torch.arange(len(experts)), torch.ones(len(experts)))
        positions, slots = (experts == self.mixture.experts.index(mlp)).nonzero(as_tuple=True)
        return ExpertShare(positions, weights[positions, slots])

    def _route(self, name: str) -> _Routes:
        """Return the experts of every position of a stream."""
        seen, parts = SeenByBatch(self.streams.ranks), []

        def routed(batch: Batch) -> Parcel:
            stream = self.residual[name].read(*batch).flatten(0, 1)
            normed = self._block.normed(self._branch, stream)
            if name == QUANTIZED:
                seen.see(batch, (stream, self._branch.input_norm.key), (normed, self.mixture.module))
            return Parcel(self._block.route(normed))

        for _, parcel in self.streams.ranks.each(self.streams.batches, routed):
            parts.append([part.cpu() for part in parcel.tensors if part is not None])
        experts, weights = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        return _Routes(experts, weights, seen.take())

    def _read(self, name: str, positions: Tensor) -> Tensor:
        return self._block.normed(self._branch, self.residual[name].gather(positions))

    def _chunks(self, positions: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(positions, self._batch), torch.split(values, self._batch), strict=True)

    def _empty(self, name: str) -> Activations:
        added = self.streams.scratch(f"experts.{name}", self.streams.reference.architecture.hidden_size)
        # The file is that of the layer before.
        added.path.unlink(missing_ok=True)
        return added
