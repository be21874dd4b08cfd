"""Tensors that transformers does not read are listed with their reason and change nothing; what is needed is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, edit_config, edit_tensors, write_checkpoint, write_predicting
from predicting import PREDICTING as FAMILIES_THAT_PREDICT
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmexport.architecture.registry import FAMILIES
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.reference.reference import Reference
from glmexport.validation.texts import EvaluationText
from glmexport.validation.whole_model import check_reference
from glmexport.workflows.original import Original, listed_unused

FREQUENCIES = {
    "model.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
}
ELSEWHERE = {"model.visual.patch_embed.proj.weight": torch.ones(4, 4), "v_head.summary.bias": torch.ones(1)}
ZEROS = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(128), "lm_head.bias": torch.zeros(264)}


def original_of(directory: Path) -> Original:
    """Opened, and its logits are those of transformers' whole model."""
    original = Original.open(str(directory), Silent())
    ids = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0))
    reference = Reference(original.checkpoint, original.architecture)
    check = check_reference(reference, [EvaluationText("t", "en", ids, 1)], directory, None, Silent())
    assert check.max_difference is not None and check.max_difference <= 1e-5
    return original


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_ignores_is_unused_with_its_reason(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family], vocab_size=264)
    zeros = dict(ZEROS)
    if family in ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"):
        zeros["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(256)
    else:
        zeros["model.layers.0.mlp.gate_up_proj.bias"] = torch.zeros(512)
    if family in ("glm4_moe_lite", "glm_moe_dsa"):
        # It is part of the model with latent attention.
        del zeros["model.layers.0.self_attn.o_proj.bias"]
    edit_tensors(tmp_path, **FREQUENCIES, **ELSEWHERE, **zeros)
    unused = original_of(tmp_path).unused
    assert {unused[key] for key in FREQUENCIES} == {"recomputed from config.json"}
    assert {unused[key] for key in ELSEWHERE} == {"belongs to no part of a language model"}
    assert {unused[key] for key in zeros} == {"a bias of zeros, which adds nothing"}
    assert set(unused) == {*FREQUENCIES, *ELSEWHERE, *zeros}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "surplus",
    [
        {"model.layers.0.mlp.down_proj.bias": torch.full((128,), 1e-3)},
        {"model.layers.0.mlp.extra.weight": torch.zeros(4)},
        {"model.layers.9.mlp.down_proj.weight": torch.zeros(4)},
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(4)},
        {"model.layers.0.self_attn.indexer.wk.bias": torch.ones(4)},
    ],
    ids=lambda surplus: next(iter(surplus)),
)
def test_what_could_be_part_of_the_model_is_refused(family: str, surplus: dict[str, Tensor], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    edit_tensors(tmp_path, **surplus)
    with pytest.raises(CheckpointError, match=next(iter(surplus))):
        Original.open(str(tmp_path), Silent())


PREDICTING = ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa")


def predicting(directory: Path, family: str) -> None:
    write_predicting(directory, family, **TINY[family])


@pytest.mark.parametrize("family", PREDICTING)
@pytest.mark.parametrize(
    ("given", "drafts"),
    [
        ({}, ["glm4_moe"]),
        ({"num_nextn_predict_layers": 0}, []),
        ({"num_mtp_layers": 0}, []),
        ({"num_nextn_predict_layers": None}, []),
        ({"num_nextn_predict_layers": 1}, list(PREDICTING)),
        ({"num_mtp_layers": 1}, list(PREDICTING)),
    ],
    ids=str,
)
def test_a_layer_that_predicts_further_is_used_where_it_is_announced_and_unused_elsewhere(
    family: str, given: dict[str, Any], drafts: list[str], tmp_path: Path
) -> None:
    predicting(tmp_path, family)
    edit_config(tmp_path, without=("num_nextn_predict_layers", "num_mtp_layers"))
    edit_config(tmp_path, **given)
    original = original_of(tmp_path)
    assert (original.architecture.token_prediction is not None) is (family in drafts)
    if family in drafts:
        assert original.unused == {}
        return
    assert len(original.unused) > 10
    ((name, reason),) = listed_unused(original.unused).items()
    assert name.startswith(f"model.layers.{TINY[family]['num_hidden_layers']}.") and "announces none" in reason


@pytest.mark.parametrize("family", PREDICTING)
def test_a_layer_of_the_kind_further_behind_is_unused(family: str, tmp_path: Path) -> None:
    predicting(tmp_path, family)
    last = TINY[family]["num_hidden_layers"]
    tensors = load_file(tmp_path / "model.safetensors")
    again = {
        key.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor.clone()
        for key, tensor in tensors.items()
        if f"layers.{last}." in key
    }
    edit_tensors(tmp_path, **again)
    original = original_of(tmp_path)
    assert original.architecture.token_prediction is not None
    assert set(original.unused) == set(again) and {"one such layer is used"} == {
        reason.split("; ")[-1] for reason in original.unused.values()
    }


def test_an_indexer_of_a_layer_that_shares_is_unused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm_moe_dsa", **TINY["glm_moe_dsa"])
    tensors = load_file(tmp_path / "model.safetensors")
    copies = {
        key.replace("layers.0.", "layers.1."): tensor.clone() + 1
        for key, tensor in tensors.items()
        if "layers.0.self_attn.indexer." in key
    }
    assert len(copies) == 5
    edit_tensors(tmp_path, **copies)
    original = original_of(tmp_path)
    assert set(original.unused) == set(copies)
    assert all("selection of the layer before" in reason for reason in original.unused.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_index_may_name_what_no_file_has_and_nobody_needs(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, tmp_path / shard, {"format": "pt"})
    surplus = "model.layers.9.eh_proj.weight"
    index = {"metadata": {}, "weight_map": dict.fromkeys([*tensors, surplus], shard)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    original = original_of(tmp_path)
    assert original.unused == {surplus: "named by the index, and in no file"}
    needed = "model.layers.0.input_layernorm.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != needed}, tmp_path / shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks tensor {needed}"):
        Original.open(str(tmp_path), Silent())


@pytest.mark.parametrize("name", FAMILIES_THAT_PREDICT)
def test_a_layer_that_predicts_further_need_not_store_the_models_tables(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES_THAT_PREDICT[name]
    write_predicting(tmp_path, family, num_hidden_layers=2, copies=False, **changes)
    original = Original.open(str(tmp_path), Silent())
    assert original.architecture.token_prediction is not None and not original.unused
