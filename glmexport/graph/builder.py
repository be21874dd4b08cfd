"""Nodes and values of a graph, one part of the decoder after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear, Norm
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.latent import LatentAttention
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.bundle.names import (
    ATTENTION_MASK,
    BLOCK_NAME,
    HIDDEN,
    INPUT_IDS,
    LOGITS,
    PAST,
    PAST_HIDDEN,
    PRESENT,
    RECENT_LOGITS,
    SHORT_STEP,
    STREAM_IN,
    STREAM_OUT,
)
from glmexport.foundation.target import GraphLimits
from glmexport.graph.caches import own_loop
from glmexport.graph.latent import LatentLayers
from glmexport.graph.operators import BLOCK, DOMAIN

#: Element types of cached keys and values; floats become the target's later. Two 4-bit codes are in a byte.
_CACHES = {"activations": ir.DataType.FLOAT, "int8": ir.DataType.INT8, "int4": ir.DataType.UINT8}


class GraphBuilder:
    """Nodes, inputs and outputs of one graph, in the order in which its parts are added.

    Tensors are [B, S, ...] with a batch and a sequence of any length.
    """

    def __init__(self, architecture: Architecture, limits: GraphLimits) -> None:
        self.architecture, self.limits = architecture, limits
        self.batch: str | int = "batch"
        self.nodes: list[ir.Node] = []
        self.block = ""
        #: The selection of positions that are needed after the attention of the present layer; None: all.
        self.asked: Callable[[ir.Value], ir.Value] | None = None
        self.input_ids = tensor_value(INPUT_IDS, ir.DataType.INT64, ["batch", "sequence"])
        #: Tells attention where the new positions are.
        self.mask = tensor_value(ATTENTION_MASK, ir.DataType.INT64, ["batch", "total_sequence"])
        self.inputs = [self.input_ids, self.mask]
        self.outputs: list[ir.Value] = []
        self.latent = LatentLayers(self, limits.latent_cache)

    def finished(self, results: Sequence[ir.Value]) -> ir.Model:
        """Return the model whose outputs are ``results`` and, behind them, the caches."""
        limits = self.limits
        graph = ir.Graph(
            self.inputs,
            [*results, *self.outputs],
            nodes=self.nodes,
            opset_imports={"": limits.opset, DOMAIN: 1},
            name=self.architecture.family,
        )
        return ir.Model(graph, ir_version=limits.ir_version, producer_name="glmexport")

    def scores(self, architecture: Architecture) -> list[ir.Value]:
        """Add the whole decoder and return the logits [B, S, V] of all positions."""
        return [self.logits(LOGITS, self.norm(architecture.final_norm, self.stream(architecture)), "sequence")]

    def generates(self, architecture: Architecture) -> list[ir.Value]:
        """Add the whole decoder and return the logits that a generating loop reads."""
        if drafts := bool(architecture.token_prediction):
            # Of all positions, which the draft's layer caches too.
            stream = self.norm(architecture.final_norm, self.stream(architecture))
            self.declare(stream, HIDDEN, ["sequence", architecture.hidden_size])
            normed = self.recent(stream)
        else:
            normed = self.norm(architecture.final_norm, self.stream(architecture, self.recent))
        if own_loop(architecture, self.limits):
            last = self.logits(LOGITS, normed, "recent")
        else:
            every = self.logits(RECENT_LOGITS, normed, "recent")
            last = self.declare(self.last(every), LOGITS, [1, architecture.vocabulary_size])
            self.outputs.append(every)
        if drafts:
            self.outputs.append(stream)
        return [last]

    def draft(self, draft: TokenPrediction) -> list[ir.Value]:
        """Add the layer that predicts further ahead; return its logits [B, 1, V] and hidden states [B, 1, D]."""
        past = tensor_value(PAST_HIDDEN, ir.DataType.FLOAT, ["batch", "sequence", draft.hidden_size])
        self.inputs.append(past)
        self.block = "draft"
        embedded = self.norm(draft.embedding_norm, self.embedding(draft.embedding))
        joined = ir.Value()
        self.node("Concat", [embedded, self.norm(draft.hidden_norm, past)], [joined], domain="", axis=-1)
        self.asked = self.last
        last = self.norm(draft.final_norm, self.layer(draft.layer, self.linears(joined, [draft.projection])))
        return [self.logits(LOGITS, last, 1, draft.lm_head), self.declare(last, HIDDEN, [1, draft.hidden_size])]

    def embedding(self, key: str) -> ir.Value:
        """Return the rows [B, S, D] of the table ``key`` for the input ids."""
        block, self.block = self.block, "embedding"
        embedded = self.op("Embedding", [self.input_ids], weight=key)
        self.block = block
        return embedded

    def recent(self, x: ir.Value) -> ir.Value:
        """Return all positions of a short step of ``x``, and the last one of a longer step."""
        return self.op("RecentPositions", [x, self.mask], most=SHORT_STEP)

    def last(self, x: ir.Value) -> ir.Value:
        """Return the last position of ``x``."""
        return self.op("LastPosition", [x, self.mask])

    def stream(self, architecture: Architecture, asked: Callable[[ir.Value], ir.Value] | None = None) -> ir.Value:
        """Return what the final norm reads, [B, S, D], or of the positions that ``asked`` takes out of that."""
        hidden = self.embedding(architecture.embedding)
        for layer in architecture.layers:
            self.asked = asked if layer is architecture.layers[-1] else None
            self.block = BLOCK_NAME.format(layer=layer.index)
            hidden = self.layer(layer, hidden)
        self.block = "head"
        return hidden

    def part(self, layers: Sequence[DecoderLayer]) -> ir.Value:
        """Add ``layers`` from one residual stream to the next; none of them: the final norm and the lm_head."""
        sizes: tuple[str | int, ...] = ("sequence", self.architecture.hidden_size)
        stream = tensor_value(STREAM_IN, ir.DataType.FLOAT, ["batch", *sizes])
        self.inputs.append(stream)
        for layer in layers:
            self.block = BLOCK_NAME.format(layer=layer.index)
            stream = self.layer(layer, stream)
        if layers:
            return self.declare(stream, STREAM_OUT, sizes)
        self.block = "head"
        return self.logits(LOGITS, self.norm(self.architecture.final_norm, stream), "sequence")

    def logits(self, name: str, normed: ir.Value, positions: str | int, head: Linear | None = None) -> ir.Value:
        """Return the output ``name`` [B, positions, V] of ``head``, or of the lm_head."""
        head = head or self.architecture.lm_head
        block, self.block = self.block, "head"
        logits = self.linears(normed, [head])
        self.block = block
        return self.declare(logits, name, [positions, head.out_features])

    def declare(self, value: ir.Value, name: str, shape: Sequence[str | int]) -> ir.Value:
        """Set name and type of an output of the graph; ``shape`` without the batch."""
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([self.batch, *shape])
        return value

    def layer(self, layer: DecoderLayer, hidden: ir.Value) -> ir.Value:
        """Return the residual stream behind ``layer``."""
        attended = self.attention(layer, self.norm(layer.attention_norm, hidden))
        if self.asked:
            hidden = self.asked(hidden)
        if layer.attention_output_norm:
            attended = self.norm(layer.attention_output_norm, attended)
        hidden = self.add(attended, hidden)
        normed = self.norm(layer.mlp_norm, hidden)
        output = (
            self.mixture(layer.mlp, normed) if isinstance(layer.mlp, MixtureOfExperts) else self.mlp(layer.mlp, normed)
        )
        if layer.mlp_output_norm:
            output = self.norm(layer.mlp_output_norm, output)
        return self.add(output, hidden)

    def mlp(self, mlp: GatedMlp, normed: ir.Value) -> ir.Value:
        """Return what a gated MLP adds to the stream."""
        gate_up = self.linears(normed, [mlp.gate_up])
        gated = self.op("GatedActivation", [gate_up], intermediate_size=mlp.intermediate_size)
        return self.linears(gated, [mlp.down])

    def mixture(self, mixture: MixtureOfExperts, normed: ir.Value) -> ir.Value:
        """Return what the chosen experts and the shared one add to the stream."""
        router = mixture.router
        logits = self.op(
            "Linear",
            [normed],
            weights=[router.weight],
            in_features=router.in_features,
            out_features=router.experts,
            float32=1,
        )
        experts, weights = ir.Value(), ir.Value()
        self.node(
            "Route",
            [logits],
            [experts, weights],
            bias=router.bias,
            experts=router.experts,
            chosen=router.chosen,
            groups=router.groups,
            kept_groups=router.kept_groups,
            normalized=int(router.normalized),
            scale=router.scale,
        )
        routed = self.op(
            "RoutedExperts",
            [normed, experts, weights],
            gate_up=[expert.gate_up.weight for expert in mixture.experts],
            down=[expert.down.weight for expert in mixture.experts],
            hidden_size=router.in_features,
            intermediate_size=mixture.experts[0].intermediate_size,
        )
        return routed if mixture.shared is None else self.add(routed, self.mlp(mixture.shared, normed))

    def attention(self, layer: DecoderLayer, normed: ir.Value) -> ir.Value:
        """Return what the attention of ``layer`` adds to the stream."""
        attention = layer.attention
        if isinstance(attention, LatentAttention):
            return self.latent.attention(layer.index, attention, normed)
        projected = [self.linears(normed, [part]) for part in (attention.query, attention.key, attention.value)]
        for index, norm in enumerate(attention.norms):
            projected[index] = self.op(
                "HeadNorm", [projected[index]], weight=norm.weight, epsilon=norm.epsilon, head_dim=norm.size
            )

        past, present = self.head_caches(layer.index, attention.kv_heads, attention.head_dim)
        attended = ir.Value()
        self.node(
            "Attention",
            [*projected, *past, self.mask],
            [attended, *present],
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            rotary_dimensions=attention.rotary.dimensions,
            interleaved=int(attention.rotary.interleaved),
        )
        return self.attention_output(attention.output, attended)

    def attention_output(self, output: Linear, attended: ir.Value) -> ir.Value:
        """Return what ``attended`` [B, S, K] adds to the stream, of the positions that anybody asks for.

        The others have to be cached, but in the last layer a prefill has no further use for them: it spares them the
        layer's other matrices.
        """
        return self.linears(self.asked(attended) if self.asked else attended, [output])

    def head_caches(self, layer: int, heads: int, size: int) -> tuple[list[ir.Value], list[ir.Value]]:
        """Return keys and values [B, heads, length, size] of the past and of the present; half as wide in 4 bits."""
        dtype = _CACHES[self.limits.kv_cache]
        width = size // 2 if self.limits.kv_cache == "int4" else size
        past, present = (
            [self.cache(name, layer, kind, [heads, length, width], dtype) for kind in ("key", "value")]
            for name, length in ((PAST, "past_sequence"), (PRESENT, "total_sequence"))
        )
        return past, present

    def cache(
        self, name: str, layer: int, kind: str, shape: Sequence[str | int], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """Add a cache to the graph's inputs or outputs, by its ``name``; ``shape`` without the batch."""
        value = tensor_value(name.format(layer=layer, kind=kind), dtype, [self.batch, *shape])
        (self.inputs if name == PAST else self.outputs).append(value)
        return value

    def norm(self, norm: Norm, x: ir.Value) -> ir.Value:
        """Return ``x`` behind an RMSNorm."""
        return self.op("RmsNorm", [x], weight=norm.weight, epsilon=norm.epsilon)

    def linears(self, x: ir.Value, parts: Sequence[Linear]) -> ir.Value:
        """Return the outputs of ``parts``, which all read ``x``, one behind the other."""
        biases = [part.bias_key for part in parts if part.bias_key]
        attributes: dict[str, Any] = {"biases": biases} if biases else {}
        return self.op(
            "Linear",
            [x],
            weights=[part.weight for part in parts],
            in_features=parts[0].in_features,
            out_features=sum(part.out_features for part in parts),
            **attributes,
        )

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return a + b."""
        total = ir.Value()
        self.node("Add", [a, b], [total], domain="")
        return total

    def op(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Add a node of one output, and return that."""
        output = ir.Value()
        self.node(operator, inputs, [output], **attributes)
        return output

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        domain: str = DOMAIN,
        **attributes: Any,
    ) -> None:
        """Add a node; outputs without a name get one."""
        # Names follow from the position in the graph, so that the same declaration gives the same bytes.
        name = f"{self.block}/{operator}_{len(self.nodes)}"
        for index, output in enumerate(outputs):
            output.name = output.name or f"{name}.{index}"
        self.nodes.append(
            ir.Node(
                domain,
                operator,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=outputs,
                name=name,
                metadata_props={BLOCK: self.block},
            )
        )


def tensor_value(name: str, dtype: ir.DataType, shape: Sequence[str | int | None]) -> ir.Value:
    """Return an input or output of a graph, of this type and shape."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
