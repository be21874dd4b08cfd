"""The decoder as a graph of our own operators, built from the declaration. Never traced, and without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from glmexport.architecture import (
    Architecture,
    DecoderLayer,
    GatedMlp,
    LatentAttention,
    Linear,
    MixtureOfExperts,
    Norm,
)
from glmexport.graph.latent import LatentLayers
from glmexport.graph.names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, PRESENT
from glmexport.graph.operators import BLOCK, DOMAIN
from glmexport.target import GraphLimits


def build_graph(architecture: Architecture, limits: GraphLimits, *, every_position: bool) -> ir.Model:
    """The graph of ``architecture``: token ids and cache in, logits and grown cache out.

    Args:
        architecture: what to build.
        limits: opset and IR version.
        every_position: logits [B, S, V] of all new positions instead of [B, 1, V] of the last one.
    """
    return _Builder(architecture, limits).model(limits, every_position)


class _Builder:
    def __init__(self, architecture: Architecture, limits: GraphLimits) -> None:
        self.architecture = architecture
        self.nodes: list[ir.Node] = []
        self.block = ""
        #: Nothing behind the attention of the layer at hand is asked of any position but the last.
        self.last_position_only = False
        self.input_ids = _value(INPUT_IDS, ir.DataType.INT64, ["batch", "sequence"])
        self.mask = _value(ATTENTION_MASK, ir.DataType.INT64, ["batch", "total_sequence"])
        self.inputs = [self.input_ids, self.mask]
        self.outputs: list[ir.Value] = []
        self.latent = LatentLayers(self, limits.latent_cache)

    def model(self, limits: GraphLimits, every_position: bool) -> ir.Model:
        architecture = self.architecture
        self.block = "embedding"
        hidden = self.op("Embedding", [self.input_ids], weight=architecture.embedding)
        for layer in architecture.layers:
            self.block = f"block_{layer.index:03d}"
            self.last_position_only = layer is architecture.layers[-1] and not every_position
            hidden = self.layer(layer, hidden)
        self.block = "head"
        logits = self.linears(self.norm(architecture.final_norm, hidden), [architecture.lm_head])
        logits.name = LOGITS
        logits.dtype = ir.DataType.FLOAT
        logits.shape = ir.Shape(["batch", "sequence" if every_position else 1, architecture.vocabulary_size])
        graph = ir.Graph(
            self.inputs,
            [logits, *self.outputs],
            nodes=self.nodes,
            opset_imports={"": limits.opset, DOMAIN: 1},
            name=architecture.family,
        )
        return ir.Model(graph, ir_version=limits.ir_version, producer_name="glmexport")

    def layer(self, layer: DecoderLayer, hidden: ir.Value) -> ir.Value:
        attended = self.attention(layer, self.norm(layer.attention_norm, hidden))
        if self.last_position_only:
            hidden = self.op("LastPosition", [hidden, self.mask])
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
        gate_up = self.linears(normed, [mlp.gate_up])
        gated = self.op("GatedActivation", [gate_up], intermediate_size=mlp.intermediate_size)
        return self.linears(gated, [mlp.down])

    def mixture(self, mixture: MixtureOfExperts, normed: ir.Value) -> ir.Value:
        router = mixture.router
        logits = self.op(
            "Linear", [normed], weights=[router.weight], in_features=router.in_features, out_features=router.experts
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
        """What ``attended`` [B, S, K] adds to the stream; [B, 1, D] where nobody asks for other positions.

        The others have to be cached, but in the last layer a prefill has no further use for them: it spares them the
        layer's other matrices.
        """
        if self.last_position_only:
            attended = self.op("LastPosition", [attended, self.mask])
        return self.linears(attended, [output])

    def head_caches(self, layer: int, heads: int, size: int) -> tuple[list[ir.Value], list[ir.Value]]:
        """Keys and values [B, heads, length, size] of the past, and those of the present."""
        kinds = ("key", "value")
        past = [self.cache(PAST, layer, kind, [heads, "past_sequence", size]) for kind in kinds]
        return past, [self.cache(PRESENT, layer, kind, [heads, "total_sequence", size]) for kind in kinds]

    def cache(self, name: str, layer: int, kind: str, shape: Sequence[str | int]) -> ir.Value:
        """A cache of the graph's inputs or outputs, by its ``name``; ``shape`` without the batch."""
        value = _value(name.format(layer=layer, kind=kind), ir.DataType.FLOAT, ["batch", *shape])
        (self.inputs if name == PAST else self.outputs).append(value)
        return value

    def norm(self, norm: Norm, x: ir.Value) -> ir.Value:
        return self.op("RmsNorm", [x], weight=norm.weight, epsilon=norm.epsilon)

    def linears(self, x: ir.Value, parts: Sequence[Linear]) -> ir.Value:
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
        total = ir.Value()
        self.node("Add", [a, b], [total], domain="")
        return total

    def op(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
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


def _value(name: str, dtype: ir.DataType, shape: Sequence[str | int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
