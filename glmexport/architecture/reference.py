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
from glmexport.architecture.latent import LatentAttention
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
        self._stacks = architecture.stacks()
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
        names = {f"{layer.prefix}.{name}" for name in module.state_dict()}
        # Matrices that the description has as one and the module as several.
        apart = {key: parts for key, parts in self._stacks.items() if names.issuperset(parts)}
        block = Block(layer, module, apart)
        weights: dict[str, Tensor] = {}
        for key in [*apart, *sorted(names - {part for parts in apart.values() for part in parts})]:
            if key not in absent:
                replaced = substitute(key) if substitute else None
                weights |= block.named(key, self.read(key) if replaced is None else replaced)
        module.load_state_dict(weights, assign=True, strict=not absent)
        module.eval().requires_grad_(False)
        return block

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
    """One decoder layer of transformers, filled.

    ``apart`` are matrices of the description whose rows the module holds as several, by checkpoint key.
    """

    def __init__(self, layer: DecoderLayer, module: nn.Module, apart: Mapping[str, tuple[str, ...]]) -> None:
        self.layer = layer
        self.module = module
        self._apart = apart

    @property
    def selects(self) -> bool:
        """Whether it attends to a selection, its own or that of the layer before."""
        attention = self.layer.attention
        return isinstance(attention, LatentAttention) and (
            attention.indexer is not None or attention.shared_selection
        )

    def forward(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The block's output for ``hidden`` [batch, length, hidden]; causal, no padding, no cache.

        ``weights`` by checkpoint key replace the block's own for this call.
        """
        return self.selecting(hidden, positions, None, weights)[0]

    def selecting(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor],
        selection: Tensor | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` in a family whose layers share what they attend to: the output, and this layer's selection.

        ``selection`` [batch, length, k] int32 is that of the layer before, of which only layers that share it make
        use; None selects everything, which is right for texts of at most ``top_k`` tokens.
        """
        named = [self.named(key, weight) for key, weight in (weights or {}).items()]
        replaced = {name: part for parts in named for name, part in parts.items()}
        arguments = self._arguments(hidden, positions, selection)
        with torch.inference_mode():
            output = torch.func.functional_call(self.module, replaced, (hidden,), arguments)
        return output if isinstance(output, tuple) else (output, None)

    def tap(self, name: str, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The input [batch, length, in_features] that the linears of tap ``name`` read."""
        return self._reaching(name, lambda: self.forward(hidden, positions))

    def branch_tap(self, name: str, stream: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The same as ``tap``, from the residual ``stream`` [batch, length, hidden] that the tap's branch adds to."""
        branch = self.layer.branch(name)
        inside = self._submodule(branch.module)
        attends = branch.module == self.layer.branches[0].module
        arguments = self._arguments(stream, positions, None) if attends else {}

        def run() -> None:
            with torch.inference_mode():
                inside(self._submodule(branch.input_norm.key)(stream), **arguments)

        return self._reaching(name, run)

    def weight(self, key: str) -> Tensor:
        """The tensor with that checkpoint key, fp32."""
        parts: list[Tensor] = [self.module.get_parameter(self._name(part)) for part in self._apart.get(key, (key,))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def named(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor with that checkpoint key as the module's parameters, by their names in it."""
        parts = self._apart.get(key, (key,))
        return {self._name(part): rows for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}

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

        linear = self.layer.taps[tap][0]
        first = self._apart.get(linear.weight, (linear.weight,))[0].removesuffix(".weight")
        handle = self._submodule(first).register_forward_pre_hook(keep)
        try:
            run()
        except _Reached:
            pass
        finally:
            handle.remove()
        # Latents come with an axis of one head.
        return read[0].squeeze(1) if read[0].dim() == 4 else read[0]

    def _submodule(self, key: str) -> nn.Module:
        return self.module.get_submodule(self._name(key))

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.layer.prefix}.")

    def _arguments(self, hidden: Tensor, positions: tuple[Tensor, Tensor], selection: Tensor | None) -> dict[str, Any]:
        """Of a decoder layer, and of its attention."""
        arguments: dict[str, Any] = {
            "attention_mask": None,
            "position_embeddings": positions,
            "past_key_values": None,
            "use_cache": False,
        }
        if self.selects:
            batch, length = hidden.shape[:2]
            # The indexer looks at the mask by itself.
            arguments["attention_mask"] = hidden.new_ones(1, 1, length, length, dtype=torch.bool).tril()
            everything = torch.arange(length, dtype=torch.int32, device=hidden.device).expand(batch, length, -1)
            arguments["prev_topk_indices"] = everything if selection is None else selection.to(hidden.device)
        return arguments
