"""A mixture of experts on its way through the walk: each expert measured on the positions that chose it.

Routing is the model's own, on each stream. An expert is measured, and its outputs are added up, over all the text
before the next one is read, so that one expert's weights and one Hessian are in memory, and every weight is read once.

A Hessian of few positions says little of most directions. It is shrunk toward what the expert would read if every
position chose it (``pooled``): H = (n H_e + p H_pool) / (n + p), where n is the number of positions that its own are
worth, and p, what the pool is worth, a fixed share of the number of columns.

The shared expert comes last: every position passes it, so that it is fitted to what the routed ones leave of the way to
the original's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.architecture.description import GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.calibration.hessian import Hessian
from glmexport.calibration.sequences import effective_count
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.goal import Sample
from glmexport.quantization.largest import Largest, Seen
from glmexport.quantization.moments import SAMPLE_POSITIONS, Measured
from glmexport.quantization.store import Activations
from glmexport.quantization.streams import ORIGINAL, QUANTIZED, Hidden, Passage
from glmexport.reference.reference import Block

#: The weight of the pool in a Hessian, in positions a column.
PRIOR = 1.0
#: Fewest held-out positions of an expert that can choose between solutions.
_LEAST_HELD = 64
#: Number of positions on which the pool of the inputs of an expert's last matrix is measured.
_POOL_POSITIONS = 2048


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


class Mixture:
    """The streams between the router of one layer and the sum of its experts."""

    def __init__(self, passage: Passage, mixture: MixtureOfExperts, batch_tokens: int) -> None:
        self.streams = passage.streams
        self.mixture = mixture
        self.layer = passage.layer
        self.residual = passage.residual
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
        assert branch.output_norm is None
        ends = linear is mlp.down
        gate_up, down = (streams.reference.read(each.weight) for each in mlp.linears) if ends else (None, None)
        into = streams.moments((linear,), down if streams.asymmetric else None)
        for start, stop in streams.batches():
            stream = self.residual[QUANTIZED].read(start, stop)
            wanted = None
            if streams.asymmetric:
                theirs = self.residual[ORIGINAL].read(start, stop)
                wanted = block.normed(branch, theirs)
                if gate_up is not None and down is not None:
                    added = self._added[ORIGINAL].read(start, stop) + block.gated(wanted @ gate_up.T) @ down.T
                    ours = block.add(branch, stream, self._added[QUANTIZED].read(start, stop))
                    wanted = block.add(branch, theirs, added) - ours
            into.add(start, inside(block.normed(branch, stream)), wanted)
        return into.result()

    def add(self, mlp: GatedMlp, solved: dict[str, QuantizedLinear]) -> Seen | None:
        """Let the outputs of ``mlp`` join the streams: as ``solved`` in the quantized one, as it was in the other.

        The result is the largest number that its last matrix read; None if no position chose it.
        """
        reference, largest = self.streams.reference, Largest()
        for name in self.streams.names:
            share = self._share(name, mlp)
            if not len(share.positions):
                continue
            gate_up, down = (
                solved[linear.weight].dequantize().to(reference.device)
                if name == QUANTIZED and linear.weight in solved
                else reference.read(linear.weight)
                for linear in mlp.linears
            )
            for chosen, weights in self._chunks(share.positions, share.weights):
                inner = self._block.gated(self._read(name, chosen) @ gate_up.T)
                if name == QUANTIZED:
                    largest.see(inner, mlp.down.key)
                self._added[name].add(chosen, (inner @ down.T).mul_(weights[:, None].to(inner.device)))
        return largest.take()

    def outputs(self) -> Hidden:
        """Return what the next layer reads."""

        def joined(name: str) -> Iterator[Tensor]:
            for start, stop in self.streams.batches():
                stream, added = self.residual[name].read(start, stop), self._added[name].read(start, stop)
                yield self._block.add(self._branch, stream, added)

        return {name: joined(name) for name in self.streams.names}

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
            self._pool = self._accumulate(everywhere, fitted, self._weights, lambda inputs: inputs, size)
        return self._pool

    def _pooled(self, inside: Callable[[Tensor], Tensor], linear: Linear) -> Tensor:
        """Return the moment of what the last matrix of an expert would read at some positions, whoever chose it."""
        fitted = ((self._weights > 0) & ~self._held).nonzero()[:, 0]
        some = fitted[:: max(1, len(fitted) // _POOL_POSITIONS)]
        share, weights = ExpertShare(some, torch.ones(len(some))), self._weights[some]
        return self._accumulate(share, torch.ones(len(some), dtype=torch.bool), weights, inside, linear.in_features)

    def _accumulate(
        self, share: ExpertShare, fitted: Tensor, weights: Tensor, inside: Callable[[Tensor], Tensor], size: int
    ) -> Tensor:
        """Return the weighted mean of x x^T over the ``fitted`` positions, [size, size] fp32; zero without any."""
        hessian = Hessian(size, self.streams.reference.device)
        total = float(weights[fitted].double().sum())
        for chosen, weight in self._chunks(share.positions[fitted], weights[fitted]):
            rows = inside(self._read(QUANTIZED, chosen)).clone()
            hessian.add(rows.mul_((weight / total).sqrt()[:, None].to(rows.device)))
        return hessian.matrix()

    def _sample(self, share: ExpertShare, weights: Tensor, inside: Callable[[Tensor], Tensor]) -> Sample | None:
        """Return held-out positions that chose the expert, if they are enough to tell anything."""
        held = ((weights > 0) & self._held[share.positions]).nonzero()[:, 0]
        held = held[:: -(-len(held) // SAMPLE_POSITIONS) or 1]
        if len(held) < _LEAST_HELD:
            return None
        inputs = [inside(self._read(QUANTIZED, chosen)) for chosen, _ in self._chunks(share.positions[held], held)]
        chosen = weights[held].to(self.streams.reference.device)
        return Sample(torch.cat(inputs), chosen / chosen.sum())

    def _inside(self, gate_up: QuantizedLinear | None) -> Callable[[Tensor], Tensor]:
        """Return a function from what an expert reads to what a matrix of it reads."""
        if gate_up is None:
            return lambda inputs: inputs
        matrix = gate_up.dequantize().to(self.streams.reference.device)
        return lambda inputs: self._block.gated(inputs @ matrix.T)

    def _share(self, name: str, mlp: GatedMlp) -> ExpertShare:
        experts, weights = self._routes[name].experts, self._routes[name].weights
        if mlp is self.mixture.shared:
            return ExpertShare(torch.arange(len(experts)), torch.ones(len(experts)))
        positions, slots = (experts == self.mixture.experts.index(mlp)).nonzero(as_tuple=True)
        return ExpertShare(positions, weights[positions, slots])

    def _route(self, name: str) -> _Routes:
        """Return the experts of every position of a stream."""
        parts, largest = [], Largest()
        for start, stop in self.streams.batches():
            stream = self.residual[name].read(start, stop).flatten(0, 1)
            normed = self._block.normed(self._branch, stream)
            if name == QUANTIZED:
                largest.see(stream, self._branch.input_norm.key)
                largest.see(normed, self.mixture.module)
            parts.append([part.cpu() for part in self._block.route(normed)])
        experts, weights = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        return _Routes(experts, weights, largest.take())

    def _read(self, name: str, positions: Tensor) -> Tensor:
        return self._block.normed(self._branch, self.residual[name].gather(positions))

    def _chunks(self, *of: Tensor) -> Iterator[tuple[Tensor, ...]]:
        yield from zip(*(torch.split(part, self._batch) for part in of), strict=True)

    def _empty(self, name: str) -> Activations:
        added = self.streams.scratch(f"experts.{name}", self.streams.reference.architecture.hidden_size)
        # The file is that of the layer before.
        added.path.unlink(missing_ok=True)
        return added
