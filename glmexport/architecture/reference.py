"""The original model, computed by transformers' own decoder layers, one block in memory at a time.

Nothing of the reference arithmetic is ours: the layer classes are transformers', created without storage on the
meta device and filled from the checkpoint when their turn comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glmexport.architecture.description import Architecture, DecoderLayer, ResidualBranch
from glmexport.checkpoint import Checkpoint

#: Replaces a weight while a block is filled: (checkpoint key) -> tensor, or None to read the checkpoint.
Substitute = Callable[[str], Tensor | None]

CPU = torch.device("cpu")

#: Rows of the embedding or lm_head held in fp32 at a time.
_SLAB_ROWS = 16384


class Reference:
    """transformers' model of ``checkpoint`` without its weights; blocks are filled on demand, in fp32 on ``device``."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device = CPU) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.architecture = architecture
        self.device = device
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        self._decoder: Any = skeleton.model.eval().requires_grad_(False)
        # The rotary tables are computed, not stored, so this module cannot stay on the meta device.
        self._rotary: nn.Module = type(self._decoder.rotary_emb)(self._decoder.config)

    def read(self, key: str) -> Tensor:
        """The checkpoint's tensor, fp32 on the device."""
        return self.checkpoint.read(key).to(self.device)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the checkpoint's tensor, fp32 on the device."""
        return self.checkpoint.rows(key, start, stop).to(self.device)

    def block(
        self, layer: DecoderLayer, substitute: Substitute | None = None, *, only: Collection[str] | None = None
    ) -> Block:
        """Decoder layer ``layer`` with its weights in fp32; of the linears those of the taps ``only``, if given."""
        module = copy.deepcopy(self._decoder.layers[layer.index])
        left_out = [linear for linear in layer.linears if only is not None and linear.tap not in only]
        absent = {key for linear in left_out for key in (linear.weight, linear.bias_key)}
        weights = {}
        for name in module.state_dict():
            key = f"{layer.prefix}.{name}"
            if key in absent:
                continue
            replaced = substitute(key) if substitute else None
            weights[name] = self.read(key) if replaced is None else replaced
        module.load_state_dict(weights, assign=True, strict=not absent)
        return Block(layer, module.eval().requires_grad_(False))

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., hidden] fp32 of token ``ids``; reads the table in slabs."""
        wanted, position = torch.unique(ids, return_inverse=True)
        key = self.architecture.embedding
        rows = torch.empty(len(wanted), self.architecture.hidden_size)
        for start in range(0, self.architecture.vocabulary_size, _SLAB_ROWS):
            stop = min(start + _SLAB_ROWS, self.architecture.vocabulary_size)
            inside = (wanted >= start) & (wanted < stop)
            if bool(inside.any()):
                rows[inside] = self.checkpoint.rows(key, start, stop)[wanted[inside] - start]
        return rows[position].to(self.device)

    def logits(self, normed: Tensor) -> Tensor:
        """lm_head of [..., hidden] fp32, as [..., vocabulary] fp32; reads the matrix in slabs."""
        vocabulary = self.architecture.vocabulary_size
        logits = normed.new_empty(*normed.shape[:-1], vocabulary)
        for start in range(0, vocabulary, _SLAB_ROWS):
            stop = min(start + _SLAB_ROWS, vocabulary)
            logits[..., start:stop] = normed @ self.rows(self.architecture.lm_head.weight, start, stop).T
        return logits

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cos and sin [length, rotary dimensions / 2] fp32 of positions 0 to length - 1, one column a pair."""
        cos, sin = self._rotary(torch.zeros(1), torch.arange(length)[None])
        half = self.architecture.layers[0].attention.rotary.dimensions // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def position_embeddings(self, length: int) -> tuple[Tensor, Tensor]:
        """What transformers' decoder layers take for positions 0 to length - 1."""
        cos, sin = self._rotary(torch.zeros(1), torch.arange(length)[None])
        return cos.to(self.device), sin.to(self.device)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """RMSNorm before the lm_head, [..., hidden] fp32."""
        module = copy.deepcopy(self._decoder.norm)
        module.load_state_dict({"weight": self.read(self.architecture.final_norm.weight)}, assign=True, strict=True)
        with torch.inference_mode():
            normed: Tensor = module(hidden)
        return normed


class _Reached(Exception):
    """Ends a computation once the input that was asked for has been read."""


class Block:
    """One decoder layer of transformers, filled."""

    def __init__(self, layer: DecoderLayer, module: nn.Module) -> None:
        self.layer = layer
        self.module = module

    def forward(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The block's output for ``hidden`` [batch, length, hidden]; causal, no padding, no cache.

        ``weights`` by checkpoint key replace the block's own for this call.
        """
        replaced = {self._name(key): weight for key, weight in (weights or {}).items()}
        with torch.inference_mode():
            output = torch.func.functional_call(self.module, replaced, (hidden,), _arguments(positions))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def tap(self, name: str, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The input [batch, length, in_features] that the linears of tap ``name`` read."""
        return self._reaching(name, lambda: self.forward(hidden, positions))

    def branch_tap(self, name: str, stream: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The same as ``tap``, from the residual ``stream`` [batch, length, hidden] that the tap's branch adds to."""
        branch = self.layer.branch(name)
        inside = self._submodule(branch.module)
        arguments = _arguments(positions) if branch.module == self.layer.branches[0].module else {}

        def run() -> None:
            with torch.inference_mode():
                inside(self._submodule(branch.input_norm.key)(stream), **arguments)

        return self._reaching(name, run)

    def weight(self, key: str) -> Tensor:
        """The tensor with that checkpoint key, fp32."""
        return self.module.get_parameter(self._name(key))

    def output(self, branch: ResidualBranch, inner: Tensor) -> Tensor:
        """What the branch's last linear makes of its input ``inner`` [batch, length, in_features]."""
        with torch.inference_mode():
            result: Tensor = self._submodule(branch.output.key)(inner)
        return result

    def add(self, branch: ResidualBranch, stream: Tensor, output: Tensor) -> Tensor:
        """The residual stream behind the branch: ``stream`` and ``output`` [batch, length, hidden], normed if it is."""
        norm = branch.output_norm
        with torch.inference_mode():
            return stream + (output if norm is None else self._submodule(norm.key)(output))

    def _reaching(self, tap: str, run: Callable[[], object]) -> Tensor:
        read: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            read.append(arguments[0])
            raise _Reached

        handle = self._submodule(self.layer.taps[tap][0].key).register_forward_pre_hook(keep)
        try:
            run()
        except _Reached:
            pass
        finally:
            handle.remove()
        return read[0]

    def _submodule(self, key: str) -> nn.Module:
        return self.module.get_submodule(self._name(key))

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.layer.prefix}.")


def _arguments(positions: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Of a decoder layer, and of its attention."""
    return {"attention_mask": None, "position_embeddings": positions, "past_key_values": None, "use_cache": False}
