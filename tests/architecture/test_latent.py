"""Latent attention and its indexer: what the declarations read, and that blocks in a row are transformers' model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from adapters import factors, write_adapter
from models import write_checkpoint
from transformers import GlmMoeDsaConfig

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent import LatentAttention
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.quantization.folding import choose_folds
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

LITE, DSA = "glm4_moe_lite", "glm_moe_dsa"
SHARED = {"index_topk": 8, "index_n_heads": 32, "index_head_dim": 24, "num_hidden_layers": 4}
SHARED["indexer_types"] = ["full", "shared", "full", "shared"]
VARIANTS = {
    "lite": (LITE, {}),
    "lite, whole queries": (LITE, {"q_lora_rank": None, "attention_bias": True}),
    "dsa": (DSA, SHARED),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def opened(path: Path, adapter: Path | None = None) -> tuple[Checkpoint, Architecture]:
    checkpoint = Checkpoint.open(path, adapter=adapter)
    architecture = describe(checkpoint)
    return architecture.presented(checkpoint), architecture


def changed(path: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Checkpoint:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in without}))
    return Checkpoint.open(path)


@variants
def test_every_tensor_is_used_once(tmp_path: Path, variant: str) -> None:
    family, changes = VARIANTS[variant]
    write_checkpoint(tmp_path, family, **changes)
    checkpoint, architecture = opened(tmp_path)
    assert architecture.account(checkpoint) == []
    assert set(architecture.shapes()) == set(checkpoint.tensors)
    taps = architecture.layers[0].taps
    parts = {tap: [linear.part for linear in linears] for tap, linears in taps.items()}
    mlp = {"mlp_input": ["gate_up"], "mlp_hidden": ["down"]}
    if variant == "lite, whole queries":
        first = {"attention_input": ["q_b", "kv_a"]}
    else:
        first = {"attention_input": ["q_a", "kv_a"], "query_latent": ["q_b"]}
    assert parts == first | {"key_value_latent": ["kv_b"], "attention_output": ["o"]} | mlp
    assert list(taps) == [*first, "key_value_latent", "attention_output", *mlp]


@variants
def test_blocks_in_a_row_are_the_model(tmp_path: Path, variant: str) -> None:
    """With more tokens than are attended to, and the selection of one layer handed to the next."""
    family, changes = VARIANTS[variant]
    model = write_checkpoint(tmp_path, family, **changes)
    reference = Reference(*opened(tmp_path))
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    hidden, selection = reference.embed(ids), None
    for layer in reference.architecture.layers:
        block = reference.block(layer)
        hidden, selection = block.selecting(hidden, reference.position_embeddings(20), selection)
    expected = model(ids).logits
    torch.testing.assert_close(reference.logits(reference.final_norm(hidden)), expected, atol=1e-5, rtol=1e-5)


def test_without_a_selection_short_text_is_the_model_and_long_text_is_not(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, DSA, **SHARED)
    reference = Reference(*opened(tmp_path))

    def difference(length: int) -> float:
        ids = torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(0))
        hidden = reference.embed(ids)
        for layer in reference.architecture.layers:
            hidden = reference.block(layer).forward(hidden, reference.position_embeddings(length))
        return float((reference.logits(reference.final_norm(hidden)) - model(ids).logits).abs().max())

    assert difference(8) < 1e-5
    assert difference(20) > 1e-3


@variants
def test_branch_after_branch_is_the_block(tmp_path: Path, variant: str) -> None:
    family, changes = VARIANTS[variant]
    write_checkpoint(tmp_path, family, **changes)
    reference = Reference(*opened(tmp_path))
    hidden = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    positions = reference.position_embeddings(7)
    layer = reference.architecture.layers[1]
    whole = reference.block(layer)
    stream, loaded = hidden, list[str]()
    for tap, linears in layer.taps.items():
        branch = layer.branch(tap)
        read = reference.block(layer, only=loaded).branch_tap(tap, stream, positions)
        assert read.shape == (2, 7, linears[0].in_features)
        torch.testing.assert_close(read, whole.tap(tap, hidden, positions), atol=1e-6, rtol=1e-6)
        loaded.append(tap)
        if branch.output in linears:
            block = reference.block(layer, only={tap})
            stream = block.add(branch, stream, block.output(branch, read))
            loaded.clear()
    torch.testing.assert_close(stream, whole.forward(hidden, positions), atol=1e-6, rtol=1e-6)


@variants
def test_every_scale_that_is_moved_cancels_out(tmp_path: Path, variant: str) -> None:
    """Also in the indexer, which reads what quantized linears read."""
    family, changes = VARIANTS[variant]
    write_checkpoint(tmp_path, family, **changes)
    checkpoint, architecture = opened(tmp_path)
    ids = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    reference = Reference(checkpoint, architecture)
    # Whatever a fold gains, it is taken.
    with patch("glmexport.quantization.folding._LEAST_GAIN", -10.0):
        folds = choose_folds(reference, ids, 1, Format(bits=4, group_size=32), 4 * 24, Silent())
    first = architecture.layers[0]
    every = {*(linear.weight for linear in first.linears), *first.attention.kept_shapes}
    names = {key.split(".")[-2] for key in every if "norm" not in key}
    assert names == {key.split(".")[-2] for key, fold in folds.items() if fold.columns is not None}

    def logits(original: Checkpoint) -> torch.Tensor:
        reference = Reference(original, architecture)
        hidden, selection = reference.embed(ids), None
        for layer in architecture.layers:
            positions = reference.position_embeddings(24)
            hidden, selection = reference.block(layer).selecting(hidden, positions, selection)
        return reference.logits(reference.final_norm(hidden))

    assert torch.equal(logits(checkpoint.folded(folds)), logits(checkpoint))


def test_an_adapter_on_a_half_changes_the_whole(tmp_path: Path) -> None:
    """Gate and up are one matrix of the description and two of the files, which is what adapters know."""
    write_checkpoint(tmp_path / "base", LITE)
    module = "model.layers.1.mlp.up_proj"
    adapter = write_adapter(tmp_path / "adapter", factors(module, 256, 128))
    merged, architecture = opened(tmp_path / "base", adapter)
    plain, _ = opened(tmp_path / "base")
    assert architecture.account(merged) == []
    key = "model.layers.1.mlp.gate_up_proj.weight"
    assert torch.equal(merged.read(key)[:256], plain.read(key)[:256])
    separately = Checkpoint.open(tmp_path / "base", adapter=adapter).read(f"{module}.weight")
    assert torch.equal(merged.rows(key, 200, 512)[56:], separately)
    assert not torch.equal(separately, plain.read(key)[256:])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (LITE, {"mlp_layer_types": ["dense"]}, "mlp_layer_types must have dense or sparse for each of the 3"),
        (LITE, {"num_key_value_heads": 2}, "num_key_value_heads"),
        (LITE, {"qk_rope_head_dim": 13, "head_dim": 13}, "pairs are rotated"),
        (LITE, {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        (LITE, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (DSA, {"indexer_types": ["shared", "full", "full"]}, "first layer has no indexer"),
        (DSA, {"indexer_types": ["full", "some", "full"]}, "indexer_types must have full or shared"),
        (DSA, {"index_head_dim": 8}, "index_head_dim 8"),
        (DSA, {"q_lora_rank": None}, "q_lora_rank"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, family)
    with pytest.raises(CheckpointError, match=message):
        describe(changed(tmp_path, **changes))


def test_without_a_list_all_layers_but_the_first_have_experts(tmp_path: Path) -> None:
    def routed(checkpoint: Checkpoint) -> list[bool]:
        return [bool(layer.mlp.routed) for layer in describe(checkpoint).layers]

    write_checkpoint(tmp_path, LITE)
    assert routed(changed(tmp_path, without=("mlp_layer_types",))) == [False, True, True]
    assert routed(changed(tmp_path, mlp_layer_types=["dense", "sparse", "dense"])) == [False, True, False]
    write_checkpoint(tmp_path, DSA)
    assert routed(changed(tmp_path, without=("mlp_layer_types",), first_k_dense_replace=2)) == [False, False, True]
    assert routed(changed(tmp_path, without=("first_k_dense_replace",))) == [False] * 3


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": 2},
        {"index_topk_pattern": "FSSFSSFS"},
        {"index_topk_pattern": ["full", "shared"] * 4},
        {"indexer_types": ["full"] * 7 + ["shared"]},
    ],
)
def test_which_layers_select_is_read_as_transformers_does(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, DSA, num_hidden_layers=8)
    architecture = describe(changed(tmp_path, without=() if "indexer_types" in keys else ("indexer_types",), **keys))
    expected = GlmMoeDsaConfig(num_hidden_layers=8, **keys).indexer_types
    latents = [layer.attention for layer in architecture.layers if isinstance(layer.attention, LatentAttention)]
    assert ["full" if attention.indexer else "shared" for attention in latents] == expected
    assert [attention.shared_selection for attention in latents] == [kind == "shared" for kind in expected]


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LITE, num_hidden_layers=3)
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "mlp_layer_types": ["dense"] * 2}
    checkpoint = changed(tmp_path, **config)
    architecture = describe(checkpoint)
    unused = dict(architecture.account(architecture.presented(checkpoint)))
    assert unused and all(key.startswith("model.layers.2.") for key in unused)


def test_what_a_token_costs_in_either_cache(tmp_path: Path) -> None:
    """GLM-4.7-Flash: 576 numbers a layer against 20 heads of 256 and 256."""
    real = {"num_attention_heads": 20, "num_key_value_heads": 20, "kv_lora_rank": 512, "qk_nope_head_dim": 192}
    write_checkpoint(tmp_path, LITE)
    checkpoint = changed(tmp_path, **real, qk_rope_head_dim=64, v_head_dim=256)
    attention = describe(checkpoint).layers[0].attention
    assert isinstance(attention, LatentAttention)
    assert (attention.latent_values, attention.head_values) == (576, 20 * 512)
