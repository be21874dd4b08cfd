"""What a layer that predicts further ahead should give, computed by transformers' own classes and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import MIXTURE, write_predicting
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmexport.assembly.write import BundleContents, write_bundle
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Block, Reference
from glmexport.workflows.original import Original
from glmexport.workflows.provenance import source_of

INDEXED: dict[str, Any] = {
    "index_topk": 64,
    "index_n_heads": 32,
    "index_head_dim": 24,
    "indexer_types": ["full", "shared"],
}
SPARSE: dict[str, Any] = {**MIXTURE, "mlp_layer_types": ["dense", "sparse"]}
#: Family and configuration; the layer is dense or a mixture as the last one of the model is.
PREDICTING: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("glm4_moe", {**MIXTURE, "attention_bias": False, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", SPARSE),
    "glm_moe_dsa": ("glm_moe_dsa", INDEXED),
}


class Predicting:
    """A checkpoint with such a layer in ``directory``, its model in transformers, and the layer's formula."""

    def __init__(self, directory: Path, family: str, **changes: Any) -> None:
        self.path = directory
        self.model, module = write_predicting(directory, family, num_hidden_layers=2, **changes)
        draft = describe(Checkpoint.open(directory)).token_prediction
        assert draft is not None
        self.block = Block(draft.layer, module)
        stored = load_file(directory / "model.safetensors")
        inside = {key.removeprefix(f"{draft.layer.prefix}."): tensor.float() for key, tensor in stored.items()}
        self.projection = inside["eh_proj.weight"]
        self.norms = {name: self._norm(inside[f"{name}.weight"]) for name in ("enorm", "hnorm", "shared_head.norm")}

    def _norm(self, weight: Tensor) -> Any:
        norm = type(self.model.model.norm)(len(weight), eps=self.model.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight})
        return norm

    def hidden(self, ids: Tensor) -> Tensor:
        """The model's hidden states [1, n, hidden] of ``ids`` [1, n] behind its final norm."""
        with torch.inference_mode():
            states: Tensor = self.model.model(ids).last_hidden_state
        return states

    def __call__(self, following: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of pairs of a token of ``following`` [1, n] and what led to it [1, n, hidden]."""
        with torch.inference_mode():
            embedded = self.norms["enorm"](self.model.model.embed_tokens(following))
            joined = torch.cat([embedded, self.norms["hnorm"](hidden)], -1) @ self.projection.T
            positions = self.model.model.rotary_emb(joined, torch.arange(following.shape[1])[None])
            normed = self.norms["shared_head.norm"](self.block.forward(joined, positions))
            return self.model.lm_head(normed), normed


def enliven(checkpoint: Path) -> None:
    """Let the last token decide more, or random weights say the same for ever; copies of it stay as they were."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= 16
    save_file(tensors, path, {"format": "pt"})


def write_unvalidated(checkpoint: Path, directory: Path, target_name: str = "x86-avx2") -> Path:
    """A bundle in fp32 arithmetic, of which nothing is measured."""
    original = Original.open(str(checkpoint), Silent()).sharing_tables()
    target = open_target(target_name)
    architecture = original.architecture_for(target)
    contents = BundleContents(
        architecture=architecture,
        weights=Weights(original.checkpoint, architecture, None, []),
        rotary_tables=Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
        recipe=open_recipe("fp32"),
        target=target,
        source=source_of(original, Silent(), target),
        tokenizer_files=original.tokenizer.files,
    )
    write_bundle(directory, contents, Silent())
    return directory
