"""Numbers of a configuration that no model has: refused by file and key before anything is described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import MIXTURE, write_checkpoint

from glmexport.architecture.registry import FAMILIES
from glmexport.architecture.rope import context_remark
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
         "max_position_embeddings")  # fmt: skip
#: What only some families read.
MORE = {
    "glm": ("num_key_value_heads", "head_dim"),
    "glm4": ("num_key_value_heads", "head_dim"),
    "glm4_moe": ("num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
                 "moe_intermediate_size", "n_shared_experts", "num_nextn_predict_layers"),
    "glm4_moe_lite": ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim", "n_routed_experts",
                      "num_nextn_predict_layers"),
    "glm_moe_dsa": ("q_lora_rank", "kv_lora_rank", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk",
                    "num_nextn_predict_layers"),
}  # fmt: skip
NO_SIZES: tuple[Any, ...] = (-1, 10**9, 10**18, True, 4.0, "4", [4], float("nan"))
#: Where none is a number too.
MAY_BE_ZERO = ("num_nextn_predict_layers",)
NO_IDS: tuple[Any, ...] = (-1, 10**18, 264, True, 3.0, "3")


def changed(directory: Path, name: str, **changes: Any) -> Checkpoint:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return Checkpoint.open(directory)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(str(request.param))
    mixed = {} if request.param in ("glm", "glm4") else MIXTURE
    layers = {"mlp_layer_types": ["dense", "sparse", "sparse"]} if request.param.endswith(("lite", "dsa")) else {}
    write_checkpoint(directory, request.param, **mixed, **layers)
    return directory


@pytest.fixture
def checkpoint(family: Path) -> Any:
    """The family's, whose files are as they were when the test is over."""
    names = ("config.json", "generation_config.json")
    before = {name: (family / name).read_bytes() for name in names}
    yield family
    for name, content in before.items():
        (family / name).write_bytes(content)


def model_type(checkpoint: Path) -> str:
    return str(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"])


def refused(checkpoint: Path, name: str, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as refusal:
        describe(changed(checkpoint, name, **{key: value}))
    message = refusal.value.message
    # A number of hundreds of digits ends the reading of the file.
    assert (f"{name}: " in message and key in message) or "400 digits" in message, value
    assert len(str(refusal.value)) < 400


def test_every_size_is_a_whole_number_within_bounds(checkpoint: Path) -> None:
    describe(Checkpoint.open(checkpoint))
    for key in (*SIZES, *MORE[model_type(checkpoint)]):
        before = (checkpoint / "config.json").read_bytes()
        for value in (*NO_SIZES, *(() if key in MAY_BE_ZERO else (0,))):
            refused(checkpoint, "config.json", key, value)
        (checkpoint / "config.json").write_bytes(before)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_every_id_is_a_row_of_the_embedding(name: str, key: str, checkpoint: Path) -> None:
    for value in (*NO_IDS, *(([value] for value in NO_IDS) if key == "eos_token_id" else ([3],))):
        refused(checkpoint, name, key, value)


@pytest.mark.parametrize("value", [[], None])
def test_a_model_that_no_token_ends_is_refused(value: Any, checkpoint: Path) -> None:
    changed(checkpoint, "config.json", eos_token_id=value)
    for same in ([], value):
        with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id names no token") as refusal:
            describe(changed(checkpoint, "generation_config.json", eos_token_id=same))
        assert "eos_token_id" in refusal.value.next_step


def test_what_the_other_file_says_decides(checkpoint: Path) -> None:
    """The end tokens of generation_config.json prevail in transformers, and an empty list there ends nothing."""
    assert describe(changed(checkpoint, "config.json", eos_token_id=[])).eos_token_ids == (256, 259)
    assert describe(changed(checkpoint, "generation_config.json", eos_token_id=7)).eos_token_ids == (7,)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        describe(changed(checkpoint, "generation_config.json", eos_token_id=[]))


def test_no_pad_token_is_the_first_end_token(checkpoint: Path) -> None:
    assert describe(changed(checkpoint, "config.json", pad_token_id=None)).pad_token_id == 256


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-5, "1e-5", True, 10**400, None])
def test_an_epsilon_that_is_no_small_number_is_refused(value: Any, checkpoint: Path) -> None:
    refused(checkpoint, "config.json", "rms_norm_eps", value)


@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "key", ["rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "attention_factor"]
)
def test_numbers_of_rotary_frequencies_are_checked(section: str, key: str, checkpoint: Path) -> None:
    good = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for value in (float("nan"), -1, "4", [4.0], True, *(() if key == "attention_factor" else (0,))):
        with pytest.raises(CheckpointError, match=rf"config\.json: {section}: {key} is "):
            describe(changed(checkpoint, "config.json", **{section: good | {key: value}}))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("table", "context", "words"),
    [
        (YARN, 256, ("YaRN by 4 reaches 1,024 tokens", "at 256", "to 1024", "original_max_position_embeddings to 256")),
        (YARN | {"original_max_position_embeddings": 256}, 256, ("reaches 1,024", "at 256", "to 1024.")),
        (YARN | {"original_max_position_embeddings": 128}, 256, ("reaches 512", "at 256", "to 512.")),
        (YARN | {"original_max_position_embeddings": 64}, 256, ()),
        (YARN | {"factor": 1.0}, 256, ()),
        ({"type": "linear", "rope_theta": 1e4, "factor": 2}, 256, ("(linear) by 2 reaches 512", "to 512.")),
        ({"rope_type": "default", "rope_theta": 1e4}, 256, ()),
    ],
)
def test_a_scaling_that_leaves_the_context_is_told(
    section: str, table: dict[str, Any], context: int, words: tuple[str, ...], checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_parameters")
    config |= {section: table, "max_position_embeddings": context}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    remark = context_remark(Checkpoint.open(checkpoint).config, context)
    assert (remark is None) == (not words)
    for word in words:
        assert word in str(remark)


@pytest.mark.parametrize("table", [YARN, YARN | {"original_max_position_embeddings": 256}], ids=["implied", "told"])
def test_what_a_remark_says_to_set_keeps_the_frequencies(table: dict[str, Any], checkpoint: Path) -> None:
    before = tables(changed(checkpoint, "config.json", rope_parameters=table))
    longer = table | {"original_max_position_embeddings": 256}
    after = tables(changed(checkpoint, "config.json", rope_parameters=longer, max_position_embeddings=1024))
    assert all(bool((one == other).all()) for one, other in zip(before, after, strict=True))


def tables(checkpoint: Checkpoint) -> Any:
    return Reference(checkpoint, describe(checkpoint)).rotary_tables(256)
