"""A configuration is read as transformers reads it, or refused before anything else, in every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, edit_config, write_checkpoint
from transformers import AutoModelForCausalLM

from glmexport.architecture.description import Architecture
from glmexport.architecture.latent import LatentAttention
from glmexport.architecture.registry import FAMILIES
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference
from glmexport.reference.skeleton import completed_checkpoint, require_agreement, skeleton
from glmexport.validation.texts import EvaluationText
from glmexport.validation.whole_model import check_reference
from glmexport.workflows.original import Original

#: Of the files and of transformers itself, not of the model; token ids are not completed.
NOT_OF_THE_MODEL = {"architectures", "model_type", "transformers_version", "dtype", "eos_token_id", "pad_token_id"}


def loads(directory: Path) -> bool:
    """Whether transformers loads the checkpoint with a place for every tensor, and computes something."""
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
        )
        with torch.inference_mode():
            model.eval()(torch.arange(12)[None])
    except Exception:
        return False
    return not any(told[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))


def difference(directory: Path) -> float:
    """Of our logits and transformers'."""
    original = Original.open(str(directory), Silent())
    ids = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0))
    reference = Reference(original.checkpoint, original.architecture)
    check = check_reference(reference, [EvaluationText("t", "en", ids, 1)], directory, None, Silent())
    assert check.max_difference is not None, check.absent_because
    return check.max_difference


@pytest.mark.parametrize("family", FAMILIES)
def test_whichever_key_is_left_out_it_is_completed_as_by_transformers_or_refused(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    whole = (tmp_path / "config.json").read_text(encoding="utf-8")
    opened = set()
    for key in sorted(set(json.loads(whole)) - NOT_OF_THE_MODEL):
        edit_config(tmp_path, without=(key,))
        if loads(tmp_path):
            assert difference(tmp_path) <= 1e-5, key
            opened.add(key)
        else:
            with pytest.raises(CheckpointError):
                Original.open(str(tmp_path), Silent())
        (tmp_path / "config.json").write_text(whole, encoding="utf-8")
    assert {"rms_norm_eps", "rope_parameters", "tie_word_embeddings", "max_position_embeddings"} <= opened
    assert not opened & {"hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"}


ODD: list[dict[str, Any]] = [
    {"head_dim": 64},
    {"head_dim": 8},
    {"head_dim": None},
    {"num_key_value_heads": None},
    {"num_attention_heads": 8},
    {"attention_bias": False},
    {"use_qk_norm": False},
    {"mlp_bias": True},
    {"partial_rotary_factor": 0.25},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0},
    {"rope_interleave": False},
    {"qk_rope_head_dim": 8},
    {"first_k_dense_replace": 0},
    {"mlp_layer_types": None},
    {"index_topk_freq": 2},
    {"num_local_experts": 8},
    {"num_experts": 8},
    {"n_shared_experts": 2},
    {"norm_topk_prob": False, "routed_scaling_factor": 0.5},
    {"rms_norm_eps": 0.1},
    {"hidden_act": "gelu"},
    {"max_position_embeddings": 0},
    {"hidden_size": 128.0},
    {"num_hidden_layers": True},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_odd_value_is_read_as_by_transformers_or_refused(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    whole = (tmp_path / "config.json").read_text(encoding="utf-8")
    opened = 0
    for changes in ODD:
        edit_config(tmp_path, **changes)
        try:
            Original.open(str(tmp_path), Silent())
        except CheckpointError:
            pass
        else:
            assert difference(tmp_path) <= 1e-5, changes
            opened += 1
        (tmp_path / "config.json").write_text(whole, encoding="utf-8")
    assert opened >= 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_the_spelling_of_transformers_4_is_the_same_model(family: str, kind: str, tmp_path: Path) -> None:
    """Base and rotary part beside the sizes, and what stretches the frequencies in a table of its own."""
    write_checkpoint(tmp_path, family, **TINY[family])
    before = describe(Checkpoint.open(tmp_path)).layers[0].attention.rotary
    rope = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    stretched = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} if kind == "yarn" else None
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    edit_config(tmp_path, without=("rope_parameters",), **older, rope_scaling=stretched)
    assert loads(tmp_path)
    after = describe(Checkpoint.open(tmp_path)).layers[0].attention.rotary
    assert after.dimensions == before.dimensions
    assert difference(tmp_path) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_of_two_tables_the_one_that_transformers_reads_counts(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    edit_config(tmp_path, rope_scaling=stretched)
    assert loads(tmp_path) and difference(tmp_path) <= 1e-5


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_without_head_dim_it_is_128(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, num_hidden_layers=1, head_dim=128)
    edit_config(tmp_path, without=("head_dim",))
    assert describe(Checkpoint.open(tmp_path)).layers[0].attention.head_dim == 128
    assert difference(tmp_path) <= 1e-5


def test_head_dim_of_glm4_moe_lite_is_the_width_of_the_rotary_part(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm4_moe_lite", num_hidden_layers=1, qk_rope_head_dim=32, head_dim=32)
    edit_config(tmp_path, qk_rope_head_dim=16, head_dim=32)
    attention = describe(Checkpoint.open(tmp_path)).layers[0].attention
    assert isinstance(attention, LatentAttention) and attention.rope == 32
    assert difference(tmp_path) <= 1e-5
    edit_config(tmp_path, qk_rope_head_dim=32, head_dim=16)
    with pytest.raises(CheckpointError, match=r"has shape .* but config\.json implies"):
        Original.open(str(tmp_path), Silent())


def test_glm_moe_dsa_rotates_neighbours_whatever_the_key_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm_moe_dsa", **TINY["glm_moe_dsa"])
    edit_config(tmp_path, rope_interleave=False)
    assert describe(Checkpoint.open(tmp_path)).layers[0].attention.rotary.interleaved


def otherwise(architecture: Architecture, change: str) -> Architecture:
    layer = architecture.layers[0]
    if change == "epsilon":
        return replace(architecture, final_norm=replace(architecture.final_norm, epsilon=1e-3))
    if change == "shape":
        return replace(architecture, vocabulary_size=3)
    if change == "rotary":
        rotary = replace(layer.attention.rotary, dimensions=4)
        first = replace(layer, attention=replace(layer.attention, rotary=rotary))
        return replace(architecture, layers=(first, *architecture.layers[1:]))
    return replace(architecture, layers=architecture.layers[:1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("epsilon", "the epsilon of model.norm is"),
        ("rotary", "the number of rotary dimensions of model.layers.0 is 16 in transformers, and 4"),
        ("shape", r"the shape of model.embed_tokens.weight is \[264, 128\] in transformers, and \[3, 128\]"),
        ("layers", "the shape of model.layers.1.* is .* in transformers, and none as glmexport reads it"),
    ],
)
def test_a_declaration_of_another_model_is_refused_by_name(
    family: str, change: str, told: str, tmp_path: Path
) -> None:
    sizes = TINY[family] | {"num_hidden_layers": max(2, TINY[family]["num_hidden_layers"])}
    write_checkpoint(tmp_path, family, **sizes)
    read, config = completed_checkpoint(Checkpoint.open(tmp_path))
    model = skeleton(config)
    architecture = FAMILIES[family](read)
    require_agreement(architecture, model, "config.json")
    with pytest.raises(CheckpointError, match=told):
        require_agreement(otherwise(architecture, change), model, "config.json")


@pytest.mark.parametrize(
    ("key", "told"),
    [("num_hidden_layers", "num_hidden_layers"), ("n_routed_experts", "n_routed_experts"),
     ("num_local_experts", "n_routed_experts"), ("num_experts", "n_routed_experts")],
)  # fmt: skip
def test_a_count_that_no_file_can_have_is_refused_at_once(key: str, told: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "glm_moe_dsa", **TINY["glm_moe_dsa"])
    edit_config(tmp_path, **{key: 10**9})
    with pytest.raises(CheckpointError, match=f"{told} is 1000000000"):
        describe(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": "x"}, "hidden_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_refuses_is_told(family: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **TINY[family])
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told):
        describe(Checkpoint.open(tmp_path))
