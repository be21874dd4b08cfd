"""The description of what a checkpoint's model consists of, without numbers.

Every weight is named by its checkpoint key. A Linear also names its ``tap``: the input it reads, which it shares
with the other linears of its layer that read the same one, so that one Hessian serves all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmexport.architecture.surplus import harmless_keys
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

if TYPE_CHECKING:
    from glmexport.architecture.experts import MixtureOfExperts
    from glmexport.architecture.grouped import GroupedQueryAttention
    from glmexport.architecture.latent import LatentAttention
    from glmexport.architecture.token_prediction import TokenPrediction


@dataclass(frozen=True)
class Linear:
    """The product y = x W^T + b, with W of shape [out_features, in_features] stored at ``key`` + ``.weight``."""

    key: str
    in_features: int
    out_features: int
    bias: bool
    #: Name of the shared input, unique within the layer.
    tap: str
    #: The part that the linear is, one word for reports and recipes: qkv, q_a, kv_a, q_b, kv_b, o, gate_up, down,
    #: lm_head; of a mixture of experts shared_gate_up, shared_down, expert_gate_up, expert_down.
    part: str

    @property
    def weight(self) -> str:
        """The checkpoint key of W."""
        return f"{self.key}.weight"

    @property
    def bias_key(self) -> str | None:
        """The checkpoint key of b [out_features], if there is one."""
        return f"{self.key}.bias" if self.bias else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint key and shape of W and b."""
        weight = {self.weight: (self.out_features, self.in_features)}
        return weight | ({self.bias_key: (self.out_features,)} if self.bias_key else {})


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last axis: x / sqrt(mean(x^2) + epsilon) * weight[size]."""

    key: str
    size: int
    epsilon: float

    @property
    def weight(self) -> str:
        """The checkpoint key of the gain."""
        return f"{self.key}.weight"


@dataclass(frozen=True)
class Rotary:
    """The rotary position embedding of the first ``dimensions`` of every head.

    ``interleaved`` rotates pairs (2i, 2i+1); otherwise pairs (i, i + dimensions / 2).
    """

    dimensions: int
    interleaved: bool


@dataclass(frozen=True)
class GatedMlp:
    """The MLP down(up * silu(gate)), with gate and up stacked along the rows of one matrix, gate first."""

    intermediate_size: int
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order in which data passes them."""
        return (self.gate_up, self.down)

    @property
    def output(self) -> Linear:
        """The linear that ends the MLP."""
        return self.down

    @property
    def module(self) -> str:
        """The key prefix of the linears."""
        return self.down.key.rpartition(".")[0]

    @property
    def routed(self) -> frozenset[str]:
        """The checkpoint keys of the matrices that only some tokens pass: none."""
        return frozenset()

    @property
    def routed_share(self) -> float:
        """The share of ``routed`` that one token passes."""
        return 1.0

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The key and shape of the tensors that are neither linears nor norms: none."""
        return {}

    @property
    def stacks(self) -> dict[str, tuple[str, str]]:
        """The checkpoint key of the stacked matrix, with the keys of its halves in checkpoints that hold them apart."""
        parent = self.gate_up.key.rpartition(".")[0]
        return {self.gate_up.weight: (f"{parent}.gate_proj.weight", f"{parent}.up_proj.weight")}

    @property
    def pages(self) -> dict[str, tuple[str, int]]:
        """The matrices that some checkpoints hold as one tensor: none."""
        return {}

    def writers(self, norm: Norm) -> dict[str, Writer]:
        """Return the writer of each tap's input; ``norm`` is that of the MLP's input."""
        return {
            self.gate_up.tap: Writer(norm, range(self.gate_up.in_features)),
            # The gate is behind a function that is not linear; up is not.
            self.down.tap: Writer(self.gate_up, range(self.intermediate_size, 2 * self.intermediate_size)),
        }


@dataclass(frozen=True)
class ResidualBranch:
    """The half of a layer that adds output_norm(output(...)) to the residual stream that ``input_norm`` reads.

    ``output_norm`` exists in families with sandwich norms only.
    """

    input_norm: Norm
    #: Key prefix of the branch's linears.
    module: str
    #: The linear that ends the branch; None where experts do.
    output: Linear | None
    output_norm: Norm | None


@dataclass(frozen=True)
class Writer:
    """The writer of a tap's input, channel by channel: channel c is element or row ``rows[c]`` of ``source``.

    The tap's linears read nothing else and nothing but them and ``also_read_by`` reads it, so that scaling a row and
    unscaling the columns that read it changes nothing.
    """

    source: Norm | Linear
    rows: Sequence[int]
    #: Linears that read ``source`` too, and are not quantized.
    also_read_by: tuple[Linear, ...] = ()


@dataclass(frozen=True)
class DecoderLayer:
    """One residual block. The two output norms exist in families with sandwich norms only."""

    index: int
    prefix: str
    attention_norm: Norm
    attention: GroupedQueryAttention | LatentAttention
    attention_output_norm: Norm | None
    mlp_norm: Norm
    mlp: GatedMlp | MixtureOfExperts
    mlp_output_norm: Norm | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order in which data passes them."""
        return (*self.attention.linears, *self.mlp.linears)

    @property
    def taps(self) -> dict[str, tuple[Linear, ...]]:
        """The linears that share each input, taps in the order in which data passes them."""
        taps: dict[str, tuple[Linear, ...]] = {}
        for linear in self.linears:
            taps[linear.tap] = (*taps.get(linear.tap, ()), linear)
        return taps

    @property
    def branches(self) -> tuple[ResidualBranch, ResidualBranch]:
        """The attention and the MLP, as additions to the residual stream."""
        output, mlp = self.attention.output, self.mlp
        return (
            ResidualBranch(self.attention_norm, output.key.rpartition(".")[0], output, self.attention_output_norm),
            ResidualBranch(self.mlp_norm, mlp.module, mlp.output, self.mlp_output_norm),
        )

    @property
    def writers(self) -> dict[str, Writer]:
        """The writer of each tap's input, where there is one."""
        return {
            **dict(self.attention.writers(self.attention_norm)),
            **self.mlp.writers(self.mlp_norm),
        }

    def branch(self, tap: str) -> ResidualBranch:
        """Return the branch that a tap is inside of."""
        key = self.taps[tap][0].key
        return next(branch for branch in self.branches if key.startswith(f"{branch.module}."))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms that exist, in order."""
        before = (self.attention_norm, *self.attention.norms, self.attention_output_norm)
        return tuple(norm for norm in (*before, self.mlp_norm, self.mlp_output_norm) if norm is not None)


@dataclass(frozen=True)
class UnusedTensors:
    """Checkpoint tensors that the description leaves out on purpose: a regular expression and the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model: embedding, layers, final norm and lm_head."""

    family: str
    hidden_size: int
    vocabulary_size: int
    context_length: int
    #: Checkpoint key of the embedding [vocabulary_size, hidden_size].
    embedding: str
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    lm_head: Linear
    #: Whether the lm_head is the embedding matrix.
    tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    unused: tuple[UnusedTensors, ...] = ()
    #: The layer that drafts tokens for speculative decoding. No answer depends on it, and it is in none of the figures
    #: below.
    token_prediction: TokenPrediction | None = None

    @property
    def linears(self) -> Iterator[tuple[int | None, Linear]]:
        """Every linear with the index of its layer; None for the lm_head."""
        for layer in self.layers:
            for linear in layer.linears:
                yield layer.index, linear
        yield None, self.lm_head

    @property
    def kv_values_per_token(self) -> int:
        """The numbers per token of context over all layers, where keys and values of every head are cached."""
        return sum(layer.attention.head_values for layer in self.layers)

    @property
    def latent_values_per_token(self) -> int | None:
        """The numbers per token where latents are cached, with the keys of indexers; None: the attention has none."""
        values = [layer.attention.latent_values for layer in self.layers]
        return None if None in values else sum(value for value in values if value is not None)

    @property
    def attended_tokens(self) -> int | None:
        """The most tokens that a token attends to; None: all that come before it."""
        return min((layer.attention.attended for layer in self.layers if layer.attention.attended), default=None)

    @property
    def rotary_bytes(self) -> int:
        """The bytes of the cosines and sines of every position of the context, fp32."""
        return self.layers[0].attention.rotary.dimensions * self.context_length * 4

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return checkpoint key and shape of every tensor that the model consists of."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (self.vocabulary_size, self.hidden_size)}
        for _, linear in self.linears:
            shapes |= linear.shapes
        for norm in (*(norm for layer in self.layers for norm in layer.norms), self.final_norm):
            shapes[norm.weight] = (norm.size,)
        for layer in self.layers:
            shapes |= layer.attention.kept_shapes | layer.mlp.kept
        return shapes

    @property
    def routed(self) -> frozenset[str]:
        """The checkpoint keys of the matrices that only some tokens pass."""
        return frozenset().union(*(layer.mlp.routed for layer in self.layers))

    def stacks(self) -> dict[str, tuple[str, str]]:
        """Return the key of every stacked matrix, and the keys of its halves in checkpoints that hold them apart.

        Mixtures of experts and families with latent attention are published so; GPTQModel quantizes gate and up as two
        matrices and stores them so.
        """
        return {key: halves for layer in self.layers for key, halves in layer.mlp.stacks.items()}

    def presented(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return ``checkpoint`` with matrices under the keys of this description, however its files hold them."""
        pages = {key: place for layer in self.layers for key, place in layer.mlp.pages.items()}
        stacked = checkpoint.stacked(self.stacks(), pages)
        return self.token_prediction.presented(stacked) if self.token_prediction else stacked

    def account(self, checkpoint: Checkpoint) -> list[tuple[str, str]]:
        """Check that every tensor of the checkpoint is used once or unused for a stated reason.

        Returns:
            (key, reason) of the unused tensors, in order of key.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is not part of the description; or an adapter
                changes a tensor that is left out, or one of two tied matrices.
        """
        wanted = self.shapes() | (self.token_prediction.own_shapes() if self.token_prediction else {})
        _check_shapes(checkpoint, wanted)
        reasons: dict[str, str] = dict.fromkeys(checkpoint.absent - set(wanted), "named by the index, and in no file")
        unknown = []
        for key in sorted(set(checkpoint.tensors) - set(wanted)):
            rules = [rule.reason for rule in self.unused if re.fullmatch(rule.pattern, key)]
            if rules:
                reasons[key] = rules[0]
            else:
                unknown.append(key)
        stacked = [half for halves in self.stacks().values() for half in halves]
        reasons |= dict(harmless_keys(checkpoint, unknown, self.layers, wanted, stacked))
        unknown = [key for key in unknown if key not in reasons]
        if unknown:
            raise CheckpointError(
                f"{checkpoint.name} has {_listed(unknown)} that the family {self.family!r} does not know.",
                next_step="Remove them from the checkpoint, or extend the family's declaration.",
            )
        self._check_adapter(checkpoint, reasons)
        return sorted(reasons.items())

    def _check_adapter(self, checkpoint: Checkpoint, unused: dict[str, str]) -> None:
        """Nothing that was trained may get lost, and what is trained for one use must not change another."""
        lost = {key: unused[key] for key in sorted(checkpoint.changed & set(unused))}
        if self.tied and self.embedding in checkpoint.changed:
            # The adapter was trained beside an lm_head that stayed as it was, or changed by itself.
            lost[self.embedding] = "tied to the lm_head, which would change with it"
        for key, reason in lost.items():
            raise CheckpointError(
                f"The adapter changes {key}, and that is {reason}.",
                next_step="Load the model with tie_word_embeddings=False, merge the adapter with PEFT "
                "(merge_and_unload), save the model, and give that as the checkpoint.",
            )


def _check_shapes(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    missing = [key for key in wanted if key not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.name} lacks {_listed(missing)}.",
            next_step="Download the checkpoint again, or correct config.json if it describes another model.",
        )
    for key, shape in wanted.items():
        found = checkpoint.tensors[key].shape
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {key} has shape {list(found)}, but config.json implies {list(shape)}.",
                next_step="Use the config.json that belongs to these weights.",
            )


def _listed(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"tensor{'s' if len(keys) > 1 else ''} {', '.join(keys[:most])}{more}"
