"""The original model, computed by transformers' own decoder layers, one block in memory at a time.

Nothing of the reference arithmetic is ours: the layer classes are transformers', created without storage on the
meta device and filled from the checkpoint when their turn comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glmexport.architecture.description import Architecture, DecoderLayer, ResidualBranch
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.latent import LatentAttention
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.reference.coarse import coarse_product, make_coarse
from glmexport.reference.filling import EXPERTS, MATRICES, ROUTER, stacked_halves, stream_experts
from glmexport.reference.past import Past
from glmexport.reference.skeleton import completed_checkpoint, skeleton

#: A function that replaces a weight while a block is filled: (checkpoint key) -> tensor, or None to read the
#: checkpoint.
Substitute = Callable[[str], Tensor | None]

CPU = torch.device("cpu")

#: Rows of the embedding or lm_head held in fp32 at a time.
_SLAB_ROWS = 16384
#: Positions whose logits of a slab are held at a time.
_ROWS = 1024


class Reference:
    """The model of ``checkpoint`` in transformers without its weights.

    Blocks are filled on demand, in fp32 on ``device``. The linears of a ``coarse`` one compute in bf16 (see
    ``coarse``), which is for calibration text and judges nothing.
    """

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device = CPU, *, coarse: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.device = device
        self.coarse = coarse
        self._substitute: Substitute | None = None
        self._embed: Callable[[Tensor], Tensor] | None = None
        _, config = completed_checkpoint(checkpoint)
        model: Any = skeleton(config)
        self._decoder: Any = model.model
        # The rotary tables are computed, not stored, so this module cannot stay on the meta device.
        rotary: Any = type(self._decoder.rotary_emb)
        self._rotary: nn.Module = rotary(config)

    def exchanged(self, substitute: Substitute, embed: Callable[[Tensor], Tensor] | None = None) -> Reference:
        """Return this model with the weights that ``substitute`` has in place of the checkpoint's.

        ``embed``, if given, looks up embeddings [..., hidden] fp32 of token ids in a table of its own.
        """
        other = copy.copy(self)
        other._substitute, other._embed = substitute, embed
        return other

    def read(self, key: str) -> Tensor:
        """Return the checkpoint's tensor, fp32 on the device."""
        return self.checkpoint.read(key).to(self.device)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the checkpoint's tensor, fp32 on the device."""
        return self.checkpoint.rows(key, start, stop).to(self.device)

    def block(
        self, layer: DecoderLayer, substitute: Substitute | None = None, *, only: Collection[str] | None = None
    ) -> Block:
        """Return decoder layer ``layer`` with weights in fp32; of its linears those of the taps ``only``, if given.

        Routed experts are read when tokens choose them.
        """
        substitute = substitute or self._substitute
        module = copy.deepcopy(self._decoder.layers[layer.index])
        left_out = [linear for linear in layer.linears if only is not None and linear.tap not in only]
        absent = {key for linear in left_out for key in (linear.weight, linear.bias_key)}

        def weight(key: str) -> Tensor:
            replaced = substitute(key) if substitute else None
            return self.read(key) if replaced is None else replaced

        if isinstance(layer.mlp, MixtureOfExperts):
            experts = layer.mlp.experts

            def matrix(index: int, name: str) -> Tensor:
                expert = experts[index]
                return weight((expert.gate_up if name == MATRICES[0] else expert.down).weight)

            stream_experts(module, matrix)
        weights: dict[str, Tensor] = {}
        apart, stacked = stacked_halves(layer), dict[str, Tensor]()
        for name in module.state_dict():
            key, half = apart.get(name, (f"{layer.prefix}.{name}", None))
            if key in absent:
                continue
            if half is None:
                weights[name] = weight(key)
                continue
            if key not in stacked:
                stacked[key] = weight(key)
            weights[name] = stacked[key].chunk(2)[half]
        module.load_state_dict(weights, assign=True, strict=not absent)
        if self.coarse:
            make_coarse(module)
        return Block(layer, module.eval().requires_grad_(False))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., hidden] fp32 of token ``ids``; reads the table in slabs."""
        if self._embed:
            return self._embed(ids)
        wanted, position = torch.unique(ids, return_inverse=True)
        key = self.architecture.embedding
        rows = torch.empty(len(wanted), self.architecture.hidden_size)
        for start in range(0, self.architecture.vocabulary_size, _SLAB_ROWS):
            stop = min(start + _SLAB_ROWS, self.architecture.vocabulary_size)
            inside = (wanted >= start) & (wanted < stop)
            if bool(inside.any()):
                rows[inside] = self.checkpoint.rows(key, start, stop)[wanted[inside] - start]
        return rows[position].to(self.device)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return ``inputs`` [..., K] times ``weight`` [N, K] transposed, [..., N], as the linears of blocks compute."""
        return coarse_product(inputs, weight) if self.coarse else inputs @ weight.T

    def logits(self, normed: Tensor) -> Tensor:
        """Return lm_head of [..., hidden] fp32, as [..., vocabulary] fp32; reads the matrix in slabs."""
        vocabulary = self.architecture.vocabulary_size
        logits = normed.new_empty(*normed.shape[:-1], vocabulary)
        for start in range(0, vocabulary, _SLAB_ROWS):
            stop = min(start + _SLAB_ROWS, vocabulary)
            logits[..., start:stop] = normed @ self.rows(self.architecture.lm_head.weight, start, stop).T
        return logits

    def likeliest(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the token of the highest logit for each row of every part [n, hidden] fp32, as [n] int64.

        Of equals it is the first. The lm_head is read once for all parts, none of which depends on the others, and no
        row's logits are held at once.
        """
        best = [part.new_full((len(part),), -torch.inf) for part in parts]
        tokens = [torch.zeros(len(part), dtype=torch.int64, device=part.device) for part in parts]
        for start in range(0, self.architecture.vocabulary_size, _SLAB_ROWS):
            stop = min(start + _SLAB_ROWS, self.architecture.vocabulary_size)
            slab = self.rows(self.architecture.lm_head.weight, start, stop)
            for part, highest_yet, likeliest in zip(parts, best, tokens, strict=True):
                for first in range(0, len(part), _ROWS):
                    rows = slice(first, first + _ROWS)
                    highest, token = (part[rows] @ slab.T).max(-1)
                    better = highest > highest_yet[rows]
                    highest_yet[rows] = torch.where(better, highest, highest_yet[rows])
                    likeliest[rows] = torch.where(better, token + start, likeliest[rows])
        return tokens

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [length, rotary dimensions / 2] fp32 of positions 0 to length - 1, one column a pair."""
        cos, sin = self._rotary(torch.zeros(1), torch.arange(length)[None])
        half = self.architecture.layers[0].attention.rotary.dimensions // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def position_embeddings(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return what transformers' decoder layers take for ``length`` positions from ``start`` on."""
        cos, sin = self._rotary(torch.zeros(1), torch.arange(start, start + length)[None])
        return cos.to(self.device), sin.to(self.device)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Return the RMSNorm before the lm_head, [..., hidden] fp32."""
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
        #: Names of the halves in which the module holds a stacked matrix, by its checkpoint key.
        self._apart: dict[str, list[str]] = {}
        names = dict(module.named_parameters())
        for name, (key, _) in stacked_halves(layer).items():
            if name in names:
                self._apart.setdefault(key, []).append(name)

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
        """Return the block's output for ``hidden`` [batch, length, hidden]; causal, no padding, no cache.

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
        """Return the output of ``forward``, and this layer's selection, where layers share what they attend to.

        ``selection`` [batch, length, k] int32 is that of the layer before, of which only layers that share it make
        use; None selects everything, which is right for texts of at most ``top_k`` tokens.
        """
        replaced: dict[str, Tensor] = {}
        for key, weight in (weights or {}).items():
            names = self._apart.get(key, [self._name(key)])
            replaced |= dict(zip(names, weight.chunk(len(names)), strict=True))
        arguments = self._arguments(hidden, positions, selection)
        with torch.inference_mode():
            output = torch.func.functional_call(self.module, replaced, (hidden,), arguments)
        return output if isinstance(output, tuple) else (output, None)

    def tap(self, name: str, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Return the input [batch, length, in_features] that the linears of tap ``name`` read."""
        return self._reaching(name, lambda: self.forward(hidden, positions))

    def branch_tap(self, name: str, stream: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Return what ``tap`` does, from the residual ``stream`` [batch, length, hidden] that the branch adds to."""
        branch = self.layer.branch(name)
        inside = self._submodule(branch.module)
        attends = branch.module == self.layer.branches[0].module
        arguments = self._arguments(stream, positions, None) if attends else {}

        def run() -> None:
            with torch.inference_mode():
                inside(self._submodule(branch.input_norm.key)(stream), **arguments)

        return self._reaching(name, run)

    def weight(self, key: str) -> Tensor:
        """Return the tensor with that checkpoint key, fp32."""
        if key in self._apart:
            return torch.cat([self.module.get_parameter(name).float() for name in self._apart[key]])
        return self.module.get_parameter(self._name(key)).float()

    def attended(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor],
        selection: Tensor | None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream behind the attention; otherwise as ``selecting``.

        ``hidden`` [texts, length, hidden] follows the tokens of ``past``, if given, to which it is appended.
        """
        branch = self.layer.branches[0]
        arguments = self._arguments(hidden, positions, selection, past)
        with torch.inference_mode():
            inside, _, *selected = self._submodule(branch.module)(self.normed(branch, hidden), **arguments)
        return self.add(branch, hidden, inside), selected[0] if selected else None

    def through(self, branch: ResidualBranch, stream: Tensor) -> Tensor:
        """Return the residual stream [batch, length, hidden] behind a branch that is no attention."""
        with torch.inference_mode():
            inside = self._submodule(branch.module)(self._submodule(branch.input_norm.key)(stream))
        return self.add(branch, stream, inside)

    def normed(self, branch: ResidualBranch, stream: Tensor) -> Tensor:
        """Return what the branch reads of the residual ``stream`` [..., hidden]."""
        with torch.inference_mode():
            result: Tensor = self._submodule(branch.input_norm.key)(stream)
        return result

    def route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each position of ``normed`` [n, hidden], and their weights, [n, chosen] int64, fp32."""
        with torch.inference_mode():
            _, weights, experts = self.module.get_submodule(ROUTER)(normed)
        return experts, weights

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return the gated activation of an expert's ``gate_up`` [n, 2 I], as [n, I]."""
        experts: Any = self.module.get_submodule(EXPERTS)
        with torch.inference_mode():
            result: Tensor = experts._apply_gate(gate_up)
        return result

    def output(self, branch: ResidualBranch, inner: Tensor) -> Tensor:
        """Return what the branch's last linear makes of its input ``inner`` [batch, length, in_features]."""
        assert branch.output is not None
        with torch.inference_mode():
            result: Tensor = self._submodule(branch.output.key)(inner)
        return result

    def add(self, branch: ResidualBranch, stream: Tensor, output: Tensor) -> Tensor:
        """Return ``stream`` + ``output`` [batch, length, hidden], the latter normed where the branch has a norm."""
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
        # Latents come with an axis of one head.
        return read[0].squeeze(1) if read[0].dim() == 4 else read[0]

    def _submodule(self, key: str) -> nn.Module:
        # Both halves of a stacked matrix read the same.
        apart = self._apart.get(f"{key}.weight")
        return self.module.get_submodule(apart[0].removesuffix(".weight") if apart else self._name(key))

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.layer.prefix}.")

    def _arguments(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor],
        selection: Tensor | None,
        past: Past | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of a decoder layer, and of its attention."""
        batch, length = hidden.shape[:2]
        before = past.longest if past else 0
        arguments: dict[str, Any] = {
            "attention_mask": None,
            "position_embeddings": positions,
            "past_key_values": past.cache if past else None,
            "use_cache": past is not None,
        }
        if past and before:
            arguments["attention_mask"] = past.mask(length).to(hidden.device)
        elif self.selects:
            # The indexer looks at the mask by itself.
            arguments["attention_mask"] = hidden.new_ones(1, 1, length, length, dtype=torch.bool).tril()
        if self.selects:
            everything = torch.arange(before + length, dtype=torch.int32, device=hidden.device)
            everything = everything.expand(batch, length, -1)
            arguments["prev_topk_indices"] = everything if selection is None else selection.to(hidden.device)
        return arguments
