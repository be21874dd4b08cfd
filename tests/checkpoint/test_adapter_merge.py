"""What a checkpoint with an adapter reads as: the merged weights, whole and by rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_builders import (
    DOWN,
    EMBED,
    HEAD,
    QUERY,
    SHAPES,
    UP,
    Tensors,
    factors,
    merged,
    write_adapter,
    write_base,
)
from adapters import PREFIX

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent


def check(tmp_path: Path, tensors: Tensors, scales: dict[str, float], **settings: Any) -> Checkpoint:
    """Exactly the modules of ``scales`` are updated, and by that; everything else is as it was."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=adapter)
    assert set(checkpoint.tensors) == set(base)
    assert checkpoint.changed >= {f"{module}.weight" for module in scales}
    for name, before in base.items():
        module = name.removesuffix(".weight")
        stored = tensors.get(f"{PREFIX}{module}.base_layer.weight", tensors.get(f"{PREFIX}{name}", before))
        found = checkpoint.read(name)
        assert found.dtype == torch.float32 and found.shape == before.shape and found.is_contiguous()
        if module in scales:
            expected = merged(stored, module, tensors, scales[module])
            assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
            assert not torch.equal(found, before)
        elif not name.endswith(".bias"):
            assert torch.equal(found, stored.float())
    return checkpoint


def test_lora(tmp_path: Path) -> None:
    checkpoint = check(tmp_path, factors(UP, DOWN, QUERY), dict.fromkeys([UP, DOWN, QUERY], 2.0))
    assert checkpoint.adapter is not None
    assert checkpoint.adapter.summary == "LoRA of rank 4; updated matrices: 3, replaced tensors: 0"
    assert torch.equal(checkpoint.read(f"{UP}.weight", torch.bfloat16), checkpoint.read(f"{UP}.weight").bfloat16())


def test_rank_stabilized_lora(tmp_path: Path) -> None:
    check(tmp_path, factors(UP, rank=5), {UP: 8 / math.sqrt(5)}, use_rslora=True, r=5)


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    tensors = factors(UP, rank=3) | factors(DOWN, rank=2) | factors(QUERY)
    ranks = {"up_proj": 3, r"layers\.1\..*": 2, "proj": 9}
    alphas = {"^model.layers.0.self_attn.q_proj": 1.5, r".*\.0\.mlp\..*": 30, "up_proj": 99}
    check(tmp_path, tensors, {UP: 30 / 3, DOWN: 8 / 2, QUERY: 1.5 / 4}, rank_pattern=ranks, alpha_pattern=alphas)


@pytest.mark.parametrize(
    "target", [r"model\.layers\.\d+\.(mlp|self_attn)\.\w+", "all-linear", None, [UP, "down_proj", "self_attn.q_proj"]]
)
def test_targets_in_every_form(target: object, tmp_path: Path) -> None:
    check(tmp_path, factors(UP, DOWN, QUERY), dict.fromkeys([UP, DOWN, QUERY], 2.0), target_modules=target)


def test_layers_to_transform_and_exclusions(tmp_path: Path) -> None:
    progress = Silent()
    settings = {"target_modules": ["up_proj", "down_proj", "q_proj"], "layers_to_transform": [0]}
    check(tmp_path, factors(UP), {UP: 2.0}, **settings, exclude_modules=["self_attn.q_proj"], layers_pattern="layers")
    Checkpoint.open(tmp_path / "base", progress, tmp_path / "adapter")
    assert progress.remarks == []


def test_fan_in_fan_out_is_left_aside_as_peft_does(tmp_path: Path) -> None:
    progress = Silent()
    check(tmp_path, factors(UP, EMBED), {UP: 2.0, EMBED: 2.0}, fan_in_fan_out=True)
    Checkpoint.open(tmp_path / "base", progress, tmp_path / "adapter")
    assert any("fan_in_fan_out" in remark for remark in progress.remarks)


def test_an_embedding_and_a_head(tmp_path: Path) -> None:
    check(tmp_path, factors(EMBED, HEAD), {EMBED: 2.0, HEAD: 2.0})


def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    whole = {f"{PREFIX}{HEAD}.weight": torch.randn(520, 24), f"{PREFIX}model.norm.weight": torch.rand(24).half()}
    checkpoint = check(tmp_path, factors(UP) | whole, {UP: 2.0}, modules_to_save=["lm_head", "norm"])
    assert checkpoint.changed == {f"{UP}.weight", "lm_head.weight", "model.norm.weight"}
    assert torch.equal(checkpoint.rows("lm_head.weight", 300, 310), whole[f"{PREFIX}{HEAD}.weight"][300:310])
    # The adapter's file is no shard of the checkpoint.
    assert [path.name for path in checkpoint.shards] == ["model.safetensors"]


def test_an_embedding_that_was_saved_with_its_update(tmp_path: Path) -> None:
    stored = {f"{PREFIX}{EMBED}.base_layer.weight": torch.randn(520, 24)}
    check(tmp_path, factors(EMBED) | stored, {EMBED: 2.0})


@pytest.mark.parametrize(
    ("bias", "name"),
    [("lora_only", f"{QUERY}.base_layer.bias"), ("all", f"{QUERY}.base_layer.bias"), ("all", f"{QUERY}.bias")],
)
def test_trained_biases(bias: str, name: str, tmp_path: Path) -> None:
    trained = torch.randn(32)
    modules = [UP] if name == f"{QUERY}.bias" else [UP, QUERY]
    tensors = factors(*modules) | {f"{PREFIX}{name}": trained}
    checkpoint = check(tmp_path, tensors, dict.fromkeys(modules, 2.0), bias=bias)
    assert torch.equal(checkpoint.read(f"{QUERY}.bias"), trained)


@pytest.mark.parametrize("stabilized", [False, True])
def test_dora(stabilized: bool, tmp_path: Path) -> None:
    modules = [UP, DOWN, QUERY, EMBED, HEAD]
    scale = 4.0 if stabilized else 2.0
    tensors = factors(*modules, dora=True)
    checkpoint = check(tmp_path, tensors, dict.fromkeys(modules, scale), use_dora=True, use_rslora=stabilized)
    magnitude = tensors[f"{PREFIX}{UP}.lora_magnitude_vector"]
    assert torch.allclose(checkpoint.read(f"{UP}.weight").norm(dim=1), magnitude, rtol=1e-6)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_factors_in_half_precision_are_multiplied_in_single(stored: torch.dtype, tmp_path: Path) -> None:
    rounded = {name: tensor.to(stored) for name, tensor in factors(UP, EMBED).items()}
    check(tmp_path, rounded, {UP: 2.0, EMBED: 2.0})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("module", [UP, DOWN, EMBED])
def test_any_rows_are_those_of_the_whole_to_the_bit(module: str, dora: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(module, dora=dora), use_dora=dora)
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=adapter)
    whole = checkpoint.read(f"{module}.weight")
    height = SHAPES[module][0]
    edges = {edge for edge in (0, 1, 2, 17, 255, 256, 257, 300, 511, 512, 513, height - 1, height) if edge <= height}
    for start in sorted(edges):
        for stop in sorted(edges):
            if start <= stop:
                found = Checkpoint.open(tmp_path / "base", adapter=adapter).rows(f"{module}.weight", start, stop)
                assert torch.equal(found, whole[start:stop]) and found.is_contiguous()
    with pytest.raises(ValueError, match="rows"):
        checkpoint.rows(f"{module}.weight", 0, height + 1)


def test_the_digest_covers_the_adapter(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapter = tmp_path / "adapter"

    def digest(tensors: Tensors, **settings: Any) -> str:
        return Checkpoint.open(tmp_path / "base", adapter=write_adapter(adapter, tensors, **settings)).digest()

    plain = digest(factors(UP))
    (adapter / "README.md").write_text("not part of it", encoding="utf-8")
    assert digest(factors(UP)) == plain
    seen = {
        plain,
        digest(factors(UP, seed=2)),
        digest(factors(UP), lora_alpha=9),
        Checkpoint.open(tmp_path / "base").digest(),
    }
    opened = Checkpoint.open(tmp_path / "base", adapter=adapter)
    assert opened.adapter is not None
    assert len(seen | {opened.adapter.digest()}) == 5


def test_an_adapter_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", factors(UP)))
    write_adapter(tmp_path / "adapter", factors(UP, DOWN))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors changed since"):
        checkpoint.read(f"{UP}.weight")
