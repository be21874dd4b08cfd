"""Graphs of fixed shapes: one sequence, so many new positions, caches of so many positions."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from glmexport.architecture.description import Architecture
from glmexport.bundle.names import ASKED, INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT
from glmexport.foundation.target import GraphLimits
from glmexport.graph.builder import GraphBuilder, tensor_value


@dataclass(frozen=True)
class FixedSizes:
    """The positions of a prompt that one run of a graph computes, and those that caches hold: the bundle's context."""

    chunk: int
    capacity: int


def fixed_sizes(architecture: Architecture, limits: GraphLimits) -> FixedSizes:
    """Return the sizes that ``limits`` give, as far as the context of ``architecture`` reaches.

    The capacity is whole chunks, so that chunks which begin at the first position never pass its end.
    """
    context = min(architecture.context_length, limits.capacity)
    chunk = min(limits.chunk, context)
    return FixedSizes(chunk, context // chunk * chunk)


def build_fixed(architecture: Architecture, limits: GraphLimits, positions: int, *, every_position: bool) -> ir.Model:
    """Build the graph of ``architecture`` for ``positions`` new tokens: ids, their positions and caches in, logits out.

    A token is written into the caches at its position and sees what is cached at no later one. So tokens behind the
    end of a text, which fill the graph up, change nothing: what they write is written over before anything sees it.

    Args:
        architecture: what to build, of a family without latent attention.
        limits: opset and IR version, and the caches' capacity.
        positions: new tokens of one run.
        every_position: logits [1, S, V] of all of them; otherwise [1, 1, V] of the one that an input asks for, of a
            single token of that.
    """
    builder = _FixedBuilder(architecture, limits, positions)
    return builder.finished(builder.scores(architecture) if every_position else builder.generates(architecture))


class _FixedBuilder(GraphBuilder):
    def __init__(self, architecture: Architecture, limits: GraphLimits, positions: int) -> None:
        super().__init__(architecture, limits)
        self.batch = 1
        self.capacity = fixed_sizes(architecture, limits).capacity
        self.positions = positions
        self.input_ids, self.mask = (
            tensor_value(name, ir.DataType.INT64, [1, positions]) for name in (INPUT_IDS, POSITION_IDS)
        )
        self.inputs = [self.input_ids, self.mask]

    def scores(self, architecture: Architecture) -> list[ir.Value]:
        normed = self.norm(architecture.final_norm, self.stream(architecture))
        return [self.logits(LOGITS, normed, self.positions)]

    def generates(self, architecture: Architecture) -> list[ir.Value]:
        if self.positions == 1:
            return self.scores(architecture)
        asked = tensor_value(ASKED, ir.DataType.INT64, [1])
        self.inputs.append(asked)

        def of_asked(x: ir.Value) -> ir.Value:
            return self.op("AskedPosition", [x, asked])

        return [self.logits(LOGITS, self.norm(architecture.final_norm, self.stream(architecture, of_asked)), 1)]

    def head_caches(self, layer: int, heads: int, size: int) -> tuple[list[ir.Value], list[ir.Value]]:
        """Keys and values [1, capacity, heads * size] of the past, and those of the present."""
        past, present = (
            [self.cache(name, layer, kind, [self.capacity, heads * size]) for kind in ("key", "value")]
            for name in (PAST, PRESENT)
        )
        return past, present
