"""Checkpoints that other libraries quantized: called by their names, with what to give instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import write_checkpoint, write_json

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError

GROUPS: dict[str, Any] = {"group_size": 64, "bits": 4}
#: By the layout: what config.json has on top of the family, as each library writes it.
TABLES: list[tuple[str, dict[str, Any]]] = [
    ("MLX", {"quantization": GROUPS}),
    ("MLX", {"quantization": GROUPS, "quantization_config": GROUPS}),
    ("MLX", {"quantization": {**GROUPS, "mode": "affine", "lm_head": False}}),
    ("AutoRound", {"quantization_config": {"quant_method": "auto-round", **GROUPS, "sym": True}}),
    ("AutoRound", {"quantization_config": {"quant_method": "intel/auto-round", **GROUPS}}),
    ("AutoRound", {"quantization_config": {"autoround_version": "0.5.1", "data_type": "int", **GROUPS}}),
    ("bitsandbytes", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ("bitsandbytes", {"quantization_config": {"load_in_8bit": True}}),
    ("FBGEMM fp8", {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
    ("HQQ", {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}),
    ("AMD Quark", {"quantization_config": {"quant_method": "quark"}}),
    ("MXFP4", {"quantization_config": {"quant_method": "mxfp4"}}),
    ("NVIDIA ModelOpt", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
    ("torchao", {"quantization_config": {"quant_method": "torchao"}}),
    ("GGUF", {"quantization_config": {"quant_method": "gguf"}}),
    ("'brand-new'", {"quantization_config": {"quant_method": "brand-new"}}),
]
#: Those that are read, where there are such tensors.
READ: list[tuple[str, dict[str, Any]]] = [
    ("AWQ", {"quantization_config": {"quant_method": "awq", **GROUPS, "version": "gemm", "zero_point": True}}),
    ("AWQ", {"quantization_config": {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}}),
    ("compressed-tensors", {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}),
    ("compressed-tensors", {"compression_config": {"format": "pack-quantized", "config_groups": {}}}),
]
PACKED = {"a.weight": torch.zeros(4, 4, dtype=torch.int32)}
WHOLE = {"a.weight": torch.zeros(4, 4, dtype=torch.bfloat16), "b": torch.ones(4)}


def opened(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    write_checkpoint(directory, {"model.safetensors": tensors}, config={"model_type": "glm4", **config})
    return Checkpoint.open(directory)


@pytest.mark.parametrize(("layout", "table"), TABLES, ids=str)
def test_a_layout_is_called_by_its_name(layout: str, table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*is quantized by {layout};") as refusal:
        opened(tmp_path, PACKED, **table)
    assert "full-precision checkpoint" in refusal.value.next_step
    assert layout == "GPTQ" or "quantized by GPTQ" not in refusal.value.message


@pytest.mark.parametrize(("layout", "table"), READ, ids=str)
def test_a_layout_without_its_tensors_is_told(layout: str, table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"quantized by {layout}, and no tensor is") as refusal:
        opened(tmp_path, PACKED, **table)
    assert refusal.value.next_step == "Download the weights again."


@pytest.mark.parametrize(("layout", "table"), [*TABLES, *READ], ids=str)
def test_an_entry_that_is_left_over_is_told_with_what_to_remove(
    layout: str, table: dict[str, Any], tmp_path: Path
) -> None:
    read = [key for key in table if key != "quantization"]
    if not read:
        # MLX's own table, which transformers ignores.
        assert opened(tmp_path, WHOLE, **table).quantized == {}
        return
    words = rf"{layout}, and every tensor is in full precision \(BF16, F32\)"
    with pytest.raises(CheckpointError, match=words) as told:
        opened(tmp_path, WHOLE, **table)
    assert f"{read[0]} from {tmp_path / 'config.json'}" in told.value.next_step


@pytest.mark.parametrize(
    ("name", "table", "layout"),
    [
        ("quantization_config.json", {"quant_method": "auto-round"}, "AutoRound"),
        ("quant_config.json", {"nbits": 4, "group_size": 64}, "HQQ"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "NVIDIA ModelOpt"),
    ],
)
def test_files_beside_the_configuration_count_where_the_weights_need_them(
    name: str, table: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    write_json(tmp_path / name, table)
    with pytest.raises(CheckpointError, match=rf"{name}: the checkpoint is quantized by {layout};"):
        opened(tmp_path, PACKED)
    # transformers does not read them either.
    assert opened(tmp_path, WHOLE).quantized == {}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("bitsandbytes", {"a.weight": torch.uint8, "a.weight.absmax": torch.float32}),
        ("bitsandbytes", {"a.weight": torch.int8, "a.SCB": torch.float32}),
        ("compressed-tensors", {"a.weight_packed": torch.int32, "a.weight_scale": torch.bfloat16}),
        ("MLX", {"a.weight": torch.uint32, "a.scales": torch.bfloat16, "a.biases": torch.bfloat16}),
        ("MXFP4", {"a.gate_up_proj_blocks": torch.uint8, "a.gate_up_proj_scales": torch.uint8}),
    ],
    ids=str,
)
def test_tensors_tell_where_no_configuration_does(
    layout: str, names: dict[str, torch.dtype], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"quantized by {layout};"):
        opened(tmp_path, {name: torch.zeros(4, 4).to(dtype) for name, dtype in names.items()})


def test_a_gguf_model_is_told_without_any_configuration(tmp_path: Path) -> None:
    (tmp_path / "glm-4-9b-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a GGUF model \(glm-4-9b-Q4_K_M\.gguf\)") as refusal:
        Checkpoint.open(tmp_path)
    assert "full-precision checkpoint" in refusal.value.next_step
    opened(tmp_path, WHOLE)


def test_fp8_that_was_dequantized_is_left_over_too(tmp_path: Path) -> None:
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(CheckpointError, match="says fp8, and every tensor is in full precision"):
        opened(tmp_path, WHOLE, quantization_config=table)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == table
