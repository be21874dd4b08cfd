"""The layer behind a model's last one that predicts one token further ahead (multi-token prediction, MTP)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from glmexport.architecture.description import Architecture, DecoderLayer, Linear, Norm, UnusedTensors
from glmexport.architecture.tables import same_numbers
from glmexport.checkpoint.checkpoint import Checkpoint

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
#: Name parts of tensors that no other layer has.
_ONLY_AHEAD = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_AHEAD = "predicts a token further ahead, for speculative decoding; no answer depends on it"


@dataclass(frozen=True)
class TokenPrediction:
    """A layer that predicts the token after the next one (MTP; DeepSeek-V3, arXiv 2412.19437, 2.2).

    With h_i the model's hidden state of token i behind its final norm, and t_(i+1) the token that it led to:
    W [embedding_norm(embed(t_(i+1))); hidden_norm(h_i)] is what the decoder layer reads at position i; behind it come
    ``final_norm`` and lm_head, whose logits are for t_(i+2). The embedding is the first half, as in vLLM
    (glm4_moe_mtp.py) and SGLang (glm4_moe_nextn.py), which run the published checkpoints; the paper writes it second.
    For tokens yet further ahead the layer is applied again, with what ``final_norm`` gave in the place of h_i, as
    SGLang does.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    #: W, [hidden_size, 2 hidden_size].
    projection: Linear
    layer: DecoderLayer
    final_norm: Norm
    #: Checkpoint key of the model's own embedding, or of one that the layer stores.
    embedding: str
    lm_head: Linear
    vocabulary_size: int
    hidden_size: int

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """The matrices that belong to it alone, in the order of the data, and last an embedding of its own."""
        own = [self.projection, *self.layer.linears]
        if self.has_own(self.lm_head.weight):
            own.append(self.lm_head)
        if self.has_own(self.embedding):
            key = self.embedding.removesuffix(".weight")
            own.append(Linear(key, self.hidden_size, self.vocabulary_size, False, "ids", "embedding"))
        return tuple(own)

    def has_own(self, key: str) -> bool:
        """Return whether a tensor belongs to it alone."""
        return key.startswith(f"{self.layer.prefix}.")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint key and shape of every tensor that it is computed with."""
        table = (self.vocabulary_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {self.embedding: table, self.lm_head.weight: table}
        for linear in self.matrices:
            shapes |= linear.shapes
        for norm in (self.embedding_norm, self.hidden_norm, *self.layer.norms, self.final_norm):
            shapes[norm.weight] = (norm.size,)
        return shapes | self.layer.attention.kept_shapes | self.layer.mlp.kept

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that belong to it alone."""
        return {key: shape for key, shape in self.shapes().items() if self.has_own(key)}

    def presented(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return ``checkpoint`` with the layer's matrices under the keys of this description."""
        return checkpoint.stacked(self.layer.mlp.stacks, self.layer.mlp.pages)


def mixture_at(checkpoint: Checkpoint, prefix: str) -> bool:
    """Return whether the layer below ``prefix`` is a mixture of experts: no configuration tells it of MTP."""
    return f"{prefix}.mlp.gate.weight" in checkpoint.tensors


def with_token_prediction(architecture: Architecture, checkpoint: Checkpoint, layer: DecoderLayer) -> Architecture:
    """Return ``architecture`` with what ``num_nextn_predict_layers`` announces.

    ``layer`` describes the decoder layer of the first one. Where the checkpoint does not have all of its tensors, in
    the shapes that they should have, it is unused, as further ones are: the models were trained with one. So is every
    layer of the kind that the configuration does not announce.

    Raises:
        CheckpointError: the configuration's number is none.
    """
    first = len(architecture.layers)
    announced = range(first, first + _announced(checkpoint))
    present = sorted(_behind(checkpoint, first, announced))
    if not present:
        return architecture
    draft, reasons = None, dict.fromkeys(present, f"{_AHEAD}; one such layer is used")
    if not announced:
        reasons = dict.fromkeys(present, f"{_AHEAD}; config.json announces none")
    elif present[0] == first:
        draft = _declared(architecture, checkpoint, layer)
        stored = draft.presented(checkpoint).tensors
        wrong = [
            name for name, shape in draft.own_shapes().items() if name not in stored or stored[name].shape != shape
        ]
        if wrong:
            draft, reasons[first] = None, f"{_AHEAD}; without {wrong[0]} in its shape it is incomplete"
        else:
            del reasons[first]
    unused = [UnusedTensors(rf"model[.]layers[.]{index}[.].+", reason) for index, reason in reasons.items()]
    return replace(architecture, token_prediction=draft, unused=(*architecture.unused, *unused))


def _announced(checkpoint: Checkpoint) -> int:
    """Number of such layers by the configuration, which that of glm4_moe completes by 1."""
    config = checkpoint.config
    key = "num_nextn_predict_layers" if config.has("num_nextn_predict_layers") else "num_mtp_layers"
    return config.integer(key, minimum=0) if config.has(key) else 0


def _behind(checkpoint: Checkpoint, first: int, announced: Collection[int]) -> set[int]:
    """Indices of the layers behind the model's last one that are announced, or have what only such layers have."""
    found = set()
    for name in checkpoint.tensors:
        match = _LAYER.match(name)
        if match and (index := int(match[1])) >= first and (index in announced or match[2].startswith(_ONLY_AHEAD)):
            found.add(index)
    return found


def share_tables(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """Return ``architecture`` with the model's tables where its MTP layer stores the same numbers once more.

    Published checkpoints do so. Both are read, a slab at a time.
    """
    draft, unused = architecture.token_prediction, list(architecture.unused)
    if draft is None:
        return architecture
    for key, ours in ((draft.embedding, architecture.embedding), (draft.lm_head.weight, architecture.lm_head.weight)):
        if draft.has_own(key) and same_numbers(checkpoint, key, ours):
            unused.append(UnusedTensors(re.escape(key), f"the same as {ours}"))
            if key == draft.embedding:
                draft = replace(draft, embedding=ours)
            else:
                draft = replace(draft, lm_head=architecture.lm_head)
    return replace(architecture, token_prediction=draft, unused=tuple(unused))


def _declared(architecture: Architecture, checkpoint: Checkpoint, layer: DecoderLayer) -> TokenPrediction:
    size, epsilon, prefix = architecture.hidden_size, architecture.final_norm.epsilon, layer.prefix
    head = replace(architecture.lm_head, key=f"{prefix}.shared_head.head")
    embedding = f"{prefix}.embed_tokens.weight"
    return TokenPrediction(
        embedding_norm=Norm(f"{prefix}.enorm", size, epsilon),
        hidden_norm=Norm(f"{prefix}.hnorm", size, epsilon),
        projection=Linear(f"{prefix}.eh_proj", 2 * size, size, False, "mtp_input", "eh_proj"),
        layer=layer,
        final_norm=Norm(f"{prefix}.shared_head.norm", size, epsilon),
        embedding=embedding if embedding in checkpoint.tensors else architecture.embedding,
        lm_head=head if head.weight in checkpoint.tensors else architecture.lm_head,
        vocabulary_size=architecture.vocabulary_size,
        hidden_size=size,
    )
