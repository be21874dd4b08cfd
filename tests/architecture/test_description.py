"""Declarations: what they read, what they account for, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, factors, write_adapter
from models import write_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.architecture.registry import FAMILIES
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference


def changed_config(directory: Path, **changes: Any) -> Checkpoint:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Checkpoint.open(directory)


@pytest.mark.parametrize(("family", "norms"), [("glm", 2), ("glm4", 4)])
def test_every_tensor_is_used_once(tmp_path: Path, family: str, norms: int) -> None:
    write_checkpoint(tmp_path, family)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = describe(checkpoint)
    assert architecture.account(checkpoint) == []
    assert set(architecture.shapes()) == set(checkpoint.tensors)
    assert all(len(layer.norms) == norms for layer in architecture.layers)
    assert list(architecture.layers[0].taps) == ["attention_input", "attention_output", "mlp_input", "mlp_hidden"]
    assert [linear.part for linear in architecture.layers[0].taps["attention_input"]] == ["qkv"] * 3


def test_a_tied_head_is_the_embedding_and_a_stored_copy_is_left_out_with_its_reason(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    architecture = describe(checkpoint)
    assert architecture.lm_head.weight == architecture.embedding
    assert architecture.account(checkpoint) == [("lm_head.weight", "tied to the embedding")]


EMBED = "model.embed_tokens"
WHOLE = {f"{PREFIX}{EMBED}.weight": torch.ones(264, 128), f"{PREFIX}lm_head.weight": torch.ones(264, 128)}


@pytest.mark.parametrize(
    ("tensors", "tied", "message"),
    [
        (factors(EMBED, 264, 128), True, "changes model.embed_tokens.weight, and that is tied to the lm_head"),
        (WHOLE, True, "changes lm_head.weight, and that is tied to the embedding"),
        (factors("lm_head", 264, 128), True, "changes lm_head.weight, and that is tied to the embedding"),
        (factors(EMBED, 264, 128) | factors("lm_head", 264, 128), False, None),
        (WHOLE, False, None),
    ],
    ids=["embedding", "both whole", "head", "both, not tied", "both whole, not tied"],
)
def test_an_adapter_must_not_change_tied_matrices(
    tensors: dict[str, torch.Tensor], tied: bool, message: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "base", vocab_size=264, tie_word_embeddings=tied)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"].clone())
    save_file(stored, tmp_path / "base" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", tensors))
    if message is None:
        assert describe(checkpoint).account(checkpoint) == []
        return
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        describe(checkpoint).account(checkpoint)
    assert "tie_word_embeddings=False" in refusal.value.next_step


def test_a_tensor_nobody_knows_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.extra.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.extra\.weight"):
        describe(checkpoint).account(checkpoint)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=2)
    checkpoint = changed_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks tensors model\.layers\.2\."):
        describe(checkpoint).account(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 14}, "7 rotary dimensions in a head of 14; pairs"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.0}}, "0 rotary dimensions in a head of"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2.0}}, "64 rotary dimensions in a head of"),
        ({"attention_bias": "yes"}, "attention_bias"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        describe(changed_config(tmp_path, **changes))


def test_the_families_of_this_version() -> None:
    assert set(FAMILIES) == {"glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"}


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_blocks_in_a_row_are_the_model(tmp_path: Path, family: str) -> None:
    model = write_checkpoint(tmp_path, family)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = describe(checkpoint)
    reference = Reference(checkpoint, architecture)
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    hidden = reference.embed(ids)
    for layer in architecture.layers:
        hidden = reference.block(layer).forward(hidden, reference.position_embeddings(20))
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(reference.logits(reference.final_norm(hidden)), expected, atol=1e-5, rtol=1e-5)


def test_a_tap_is_the_input_its_linears_read(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = describe(checkpoint)
    reference = Reference(checkpoint, architecture)
    hidden = torch.randn(1, 6, architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = reference.position_embeddings(6)
    layer = architecture.layers[1]
    block = reference.block(layer)
    normed = model.model.layers[1].input_layernorm(hidden)
    torch.testing.assert_close(block.tap("attention_input", hidden, positions), normed)
    inner = block.tap("mlp_hidden", hidden, positions)
    assert inner.shape == (1, 6, layer.mlp.intermediate_size)
    # What the tap of the last linear reads, put through it, and the rest of the block, is the block's output.
    down = model.model.layers[1].mlp.down_proj(inner)
    attended = block.forward(hidden, positions) - model.model.layers[1].post_mlp_layernorm(down)
    again = block.tap("mlp_input", hidden, positions)
    torch.testing.assert_close(model.model.layers[1].post_attention_layernorm(attended), again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_branch_after_branch_is_the_block(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = describe(checkpoint)
    reference = Reference(checkpoint, architecture)
    hidden = torch.randn(2, 9, architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = reference.position_embeddings(9)
    layer = architecture.layers[1]
    whole = reference.block(layer)
    stream = hidden
    loaded: list[str] = []
    for tap, linears in layer.taps.items():
        branch = layer.branch(tap)
        # Only what lies between the stream and the tap is there.
        block = reference.block(layer, only=loaded)
        read = block.branch_tap(tap, stream, positions)
        torch.testing.assert_close(read, whole.tap(tap, hidden, positions), atol=1e-6, rtol=1e-6)
        loaded.append(tap)
        if branch.output in linears:
            block = reference.block(layer, only={tap})
            stream = block.add(branch, stream, block.output(branch, read))
            loaded.clear()
    torch.testing.assert_close(stream, whole.forward(hidden, positions), atol=1e-6, rtol=1e-6)


def test_generation_config_says_what_ends_a_generation(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert describe(Checkpoint.open(tmp_path)).eos_token_ids == (256, 259)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 259, 261]}))
    assert describe(Checkpoint.open(tmp_path)).eos_token_ids == (256, 259, 261)
    (tmp_path / "generation_config.json").unlink()
    assert describe(Checkpoint.open(tmp_path)).eos_token_ids == (256, 259)
