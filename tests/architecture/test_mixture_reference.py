"""glm4_moe: every layout of its files is the same model, and its experts need not be in memory together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MIXTURE, write_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.architecture.description import Architecture
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.reference import filling
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def presented(path: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = Checkpoint.open(path)
    architecture = describe(checkpoint)
    return architecture.presented(checkpoint), architecture


def logits(path: Path) -> torch.Tensor:
    checkpoint, architecture = presented(path)
    reference = Reference(checkpoint, architecture)
    hidden = reference.embed(IDS)
    for layer in architecture.layers:
        hidden = reference.block(layer).forward(hidden, reference.position_embeddings(IDS.shape[1]))
    return reference.logits(reference.final_norm(hidden))


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


def joined_gate_up(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for key in [key for key in tensors if key.endswith("gate_proj.weight")]:
        up = key.replace("gate_proj", "up_proj")
        tensors[key.replace("gate_proj", "gate_up_proj")] = torch.cat([tensors.pop(key), tensors.pop(up)])
    return tensors


def stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = joined_gate_up(tensors)
    for name in ("gate_up_proj", "down_proj"):
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp.experts"
            keys = [f"{prefix}.{index}.{name}.weight" for index in range(MIXTURE["n_routed_experts"])]
            tensors[f"{prefix}.{name}"] = torch.stack([tensors.pop(key) for key in keys])
    return tensors


@pytest.mark.parametrize("layout", [per_expert, joined_gate_up, stacked_experts])
@pytest.mark.parametrize("normed", [False, True], ids=["", "qk-norm"])
def test_every_layout_is_the_model_of_transformers(tmp_path: Path, layout: Any, normed: bool) -> None:
    model = write_checkpoint(tmp_path, "glm4_moe", **MIXTURE, use_qk_norm=normed)
    save_file(layout(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, architecture = presented(tmp_path)
    assert architecture.account(checkpoint) == []
    assert set(architecture.shapes()) == set(checkpoint.tensors)
    assert [isinstance(layer.mlp, MixtureOfExperts) for layer in architecture.layers] == [False, True, True]
    with torch.inference_mode():
        torch.testing.assert_close(logits(tmp_path), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_experts_that_are_read_when_they_are_chosen_compute_what_all_of_them_in_memory_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    whole = logits(tmp_path)
    read: list[str] = []
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str, *rest: Any) -> torch.Tensor:
        read.append(name)
        return plain(self, name, *rest)

    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr(filling.stream_experts, "__defaults__", (0,))
    checkpoint, architecture = presented(tmp_path)
    layer = architecture.layers[1]
    reference = Reference(checkpoint, architecture)
    block = reference.block(layer)
    assert not layer.mlp.routed & set(read)
    hidden = reference.embed(IDS[:, :1])
    block.forward(hidden, reference.position_embeddings(1))
    chosen, _ = block.route(block.normed(layer.branches[1], hidden.flatten(0, 1)))
    # Two tokens, without the attention's part in the route: at most four experts each are read, not sixteen.
    experts = {key.rsplit(".", 2)[0] for key in set(read) & layer.mlp.routed}
    assert 1 <= len(experts) <= 2 * MIXTURE["num_experts_per_tok"] < MIXTURE["n_routed_experts"]
    assert chosen.shape == (2, MIXTURE["num_experts_per_tok"])
    assert torch.equal(logits(tmp_path), whole)


def test_a_router_bias_keeps_its_fp32(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    checkpoint, architecture = presented(tmp_path)
    bias = checkpoint.read(architecture.layers[1].mlp.router.bias)
    assert torch.equal(bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert not torch.equal(bias, bias.bfloat16().float())


def test_layers_of_token_prediction_are_left_out_with_their_reason(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE, num_mtp_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in ("eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight"):
        tensors[f"model.layers.3.{key}"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, architecture = presented(tmp_path)
    unused = dict(architecture.account(checkpoint))
    assert len(unused) == 3 and all("speculative" in reason for reason in unused.values())
    tensors["model.layers.4.mlp.gate.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, architecture = presented(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.mlp\.gate"):
        architecture.account(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [{"n_group": 3}, {"n_group": 16}, {"topk_group": 5}, {"num_experts_per_tok": 9}, {"n_routed_experts": None}],
    ids=str,
)
def test_numbers_that_do_not_fit_each_other_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match="n_routed_experts" if None in changes.values() else "cannot be chosen"):
        describe(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("model_type", ["glm4v", "glm4v_moe", "glm46v", "glm_ocr"])
def test_models_that_see_are_refused_with_their_text_part(tmp_path: Path, model_type: str) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    path = tmp_path / "config.json"
    text = {"model_type": f"{model_type}_text"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type, "text_config": text}))
    with pytest.raises(CheckpointError, match=re.escape(f"text-only part is '{model_type}_text'")) as refusal:
        describe(Checkpoint.open(tmp_path))
    assert "glm4_moe" in refusal.value.next_step


def fp8(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Linears as fp8 with a factor a block, as transformers' FineGrainedFP8 checkpoints have them."""
    changed = {}
    for key, tensor in tensors.items():
        linear = key.endswith("_proj.weight")
        if not linear:
            changed[key] = tensor
            continue
        rows, columns = tensor.shape
        factors = torch.rand(-(-rows // block[0]), -(-columns // block[1])) * 0.01 + 0.001
        spread = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        changed[key] = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        changed[key.replace(".weight", ".weight_scale_inv")] = factors
    return changed


@pytest.mark.parametrize("block", [(128, 128), (48, 40)], ids=str)
def test_fp8_blocks_are_read_as_what_they_stand_for(tmp_path: Path, block: tuple[int, int]) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE, intermediate_size=264)
    stored = fp8(load_file(tmp_path / "model.safetensors"), block)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    table = {"quant_method": "fp8", "weight_block_size": list(block)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": table}))
    checkpoint, architecture = presented(tmp_path)
    assert architecture.account(checkpoint) == []

    def weight(key: str) -> torch.Tensor:
        codes, factors = stored[f"{key}.weight"].float(), stored[f"{key}.weight_scale_inv"]
        naive = torch.empty_like(codes)
        for row in range(codes.shape[0]):
            for column in range(0, codes.shape[1], block[1]):
                span = slice(column, column + block[1])
                naive[row, span] = codes[row, span] * factors[row // block[0], column // block[1]]
        return naive

    mlp = architecture.layers[0].mlp
    assert torch.equal(checkpoint.read(mlp.down.weight), weight("model.layers.0.mlp.down_proj"))
    halves = torch.cat([weight(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up")])
    assert torch.equal(checkpoint.read(mlp.gate_up.weight), halves)
    assert torch.equal(checkpoint.rows(mlp.gate_up.weight, 100, 300), halves[100:300])
    assert logits(tmp_path).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.pop(f"{key}_scale_inv"), "there is no model.layers.1.self_attn.o_proj.weight"),
        (lambda tensors, key: tensors.pop(key), "its matrix is absent"),
        (lambda tensors, key: tensors.update({f"{key}_scale_inv": torch.ones(3, 3)}), r"shape \[3, 3\]"),
    ],
    ids=["no factors", "no matrix", "other blocks"],
)
def test_broken_fp8_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    stored = fp8(load_file(tmp_path / "model.safetensors"), (128, 128))
    change(stored, "model.layers.1.self_attn.o_proj.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": table}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("together", [1, 50, 1 << 15])
def test_texts_that_pass_the_experts_together_pass_them_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    from glmexport.foundation.progress import Silent
    from glmexport.validation import reference as by_block
    from glmexport.validation.texts import EvaluationText

    model = write_checkpoint(tmp_path, "glm4_moe", **MIXTURE)
    checkpoint, architecture = presented(tmp_path)
    texts = [EvaluationText("d", "en", torch.arange(3, 3 + length) * 5 % 250, 1) for length in (20, 31, 7, 24, 2)]
    monkeypatch.setattr(by_block, "_TOGETHER", together)
    routed: list[int] = []
    through = by_block.Block.through

    def counted(self: Any, branch: Any, stream: torch.Tensor) -> torch.Tensor:
        routed.append(stream.shape[1])
        return through(self, branch, stream)

    monkeypatch.setattr(by_block.Block, "through", counted)
    reference = Reference(checkpoint, architecture)
    states = by_block.reference_states(reference, texts, tmp_path, Silent(), batch=2)
    expected_groups = {1: [20, 31, 7, 24, 2], 50: [20, 38, 26], 1 << 15: [84]}[together]
    assert routed == 2 * expected_groups
    for index, text in enumerate(texts):
        with torch.inference_mode():
            expected = model(text.ids[None]).logits[0, :-1]
        torch.testing.assert_close(reference.logits(states.states(index)), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_halves_of_stacked_matrices_is_merged_into_them(tmp_path: Path) -> None:
    from adapters import PREFIX, factors, write_adapter

    write_checkpoint(tmp_path / "base", "glm4_moe", **MIXTURE)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    up, gate = "model.layers.1.mlp.shared_experts.up_proj", "model.layers.0.mlp.gate_proj"
    whole = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    tensors = {**factors(gate, 256, 128), f"{PREFIX}{up}.weight": whole}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=adapter)
    merged = checkpoint.read(f"{gate}.weight")
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    assert architecture.account(checkpoint) == []
    dense, mixture = architecture.layers[0].mlp, architecture.layers[1].mlp
    assert not torch.equal(merged, stored[f"{gate}.weight"].float())
    assert torch.equal(checkpoint.read(dense.gate_up.weight)[:256], merged)
    assert torch.equal(checkpoint.read(mixture.shared.gate_up.weight)[64:], whole)
    halves = stored["model.layers.1.mlp.shared_experts.gate_proj.weight"].float()
    assert torch.equal(checkpoint.read(mixture.shared.gate_up.weight)[:64], halves)
