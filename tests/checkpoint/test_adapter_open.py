"""Opening an adapter: what is refused, with the file, the tensor or setting, and a next step; and what is remarked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_builders import DOWN, EMBED, HEAD, QUERY, UP, Tensors, factors, write_adapter, write_base
from adapters import PREFIX, WEIGHTS
from checkpoint_builders import write_checkpoint, write_json, write_tokenizer

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent


def refuse(tmp_path: Path, message: str, tensors: Tensors | None = None, **settings: Any) -> CheckpointError:
    """Opening that adapter fails with words that match ``message`` and a next step."""
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(UP) if tensors is None else tensors, **settings)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Checkpoint.open(tmp_path / "base", adapter=adapter)
    assert str(adapter) in refusal.value.message
    assert refusal.value.next_step.endswith(".")
    return refusal.value


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "IA3"},
        {"lora_bias": True},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1e-4}},
        {"megatron_config": {"x": 1}},
        {"a_setting_of_the_future": 3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_other_kinds_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    key = next(iter(setting))
    refusal = refuse(tmp_path, rf"adapter_config\.json: {key} is .*only LoRA, rsLoRA and DoRA", **setting)
    assert "merge_and_unload" in refusal.next_step


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(start: str, tmp_path: Path) -> None:
    refusal = refuse(tmp_path, "init_lora_weights is .* changed the base weights", init_lora_weights=start)
    assert "path_initial_model_for_weight_conversion" in refusal.next_step


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_leave_the_base_alone(start: object, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(UP), init_lora_weights=start)
    assert Checkpoint.open(tmp_path / "base", adapter=adapter).changed == {f"{UP}.weight"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, 'r is "8"'),
        ({"r": True}, "r is true"),
        ({"r": 10**18}, "r is 1000000000000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is NaN"),
        ({"alpha_pattern": {"up_proj": float("inf")}}, "up_proj is Infinity"),
        ({"rank_pattern": {"up_proj": 10**9}}, "up_proj is 1000000000"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [true]"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"bias": "some"}, 'bias is "some"'),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"rank_pattern": {"up_proj": 0.5}}, "up_proj is 0.5"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": "model.(layers"}, "'model.(layers' is not a regular expression"),
        ({"rank_pattern": {"*": 2}}, "'*' is not a regular expression"),
    ],
)
def test_settings_of_another_type_are_refused(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    refuse(tmp_path, rf"adapter_config\.json: .*{re.escape(message)}", **setting)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(PREFIX + name)


def added(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


NO_PLACE = "which has no place in the checkpoint"
TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "none at all": (lambda tensors: tensors.clear(), "has no tensors"),
    "A without B": (without(f"{UP}.lora_B.weight"), f"lacks tensor '{PREFIX}{UP}.lora_B.weight'"),
    "B without A": (without(f"{UP}.lora_A.weight"), f"lacks tensor '{PREFIX}{UP}.lora_A.weight'"),
    "unknown": (added(f"{PREFIX}model.extra.weight", 2), f"tensor '{PREFIX}model.extra.weight', {NO_PLACE}"),
    "no prefix": (added(f"{UP}.weight", 600, 24), f"tensor '{UP}.weight', {NO_PLACE}"),
    "no prefix, an update": (added(f"{DOWN}.lora_A.weight", 4, 70), f"tensor '{DOWN}.lora_A.weight', {NO_PLACE}"),
    "a bias of B": (added(f"{PREFIX}{UP}.lora_B.bias", 600), f"lora_B.bias', {NO_PLACE}"),
    "a name of the adapter": (added(f"{PREFIX}{UP}.lora_A.default.weight", 4, 24), f"default.weight', {NO_PLACE}"),
    "a magnitude without DoRA": (added(f"{PREFIX}{UP}.lora_magnitude_vector", 600), f"vector', {NO_PLACE}"),
    "both kinds of factors": (added(f"{PREFIX}{UP}.lora_embedding_A", 4, 600), "lacks tensor .*lora_embedding_B"),
    "an update and a replacement": (added(f"{PREFIX}{UP}.weight", 600, 24), f"{UP}.weight', {NO_PLACE}"),
    "two replacements": (
        lambda tensors: tensors.update(
            {f"{PREFIX}{QUERY}.base_layer.bias": torch.zeros(32), f"{PREFIX}{QUERY}.bias": torch.zeros(32)}
            | factors(QUERY)
        ),
        f"bias', {NO_PLACE}",
    ),
    "a base layer without an update": (
        added(f"{PREFIX}{DOWN}.base_layer.weight", 24, 70), f"base_layer.weight', {NO_PLACE}"
    ),
    "an unknown module": (
        lambda tensors: tensors.update(
            {
                f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 24),
                f"{PREFIX}model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(600, 4),
            }
        ),
        "updates 'model.layers.7.mlp.up_proj', which the checkpoint does not have",
    ),
    "a norm": (
        lambda tensors: tensors.update(
            {
                f"{PREFIX}model.norm.lora_A.weight": torch.zeros(4, 24),
                f"{PREFIX}model.norm.lora_B.weight": torch.zeros(24, 4),
            }
        ),
        r"'model.norm.weight' of shape \[24\] is no matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_has_one_place(name: str, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    tensors = factors(UP)
    change(tensors)
    refuse(tmp_path, message, tensors, target_modules=None)


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        (f"{UP}.lora_A.weight", (3, 24), "[4, ...]"),
        (f"{UP}.lora_A.weight", (4, 25), "[4, 24]"),
        (f"{UP}.lora_A.weight", (4,), "[4, ...]"),
        (f"{UP}.lora_B.weight", (599, 4), "[600, 4]"),
        (f"{UP}.lora_B.weight", (600, 3), "[600, 4]"),
        (f"{EMBED}.lora_embedding_A", (24, 4), "[4, ...]"),
        (f"{EMBED}.lora_embedding_B", (520, 4), "[24, 4]"),
        (f"{EMBED}.lora_magnitude_vector", (520,), "[24]"),
        (f"{UP}.lora_magnitude_vector", (1, 600), "[600]"),
        (f"{EMBED}.base_layer.weight", (521, 24), "[520, 24]"),
        (f"{HEAD}.weight", (521, 24), "[520, 24]"),
    ],
)
def test_shapes_are_those_of_the_base(name: str, shape: tuple[int, ...], needed: str, tmp_path: Path) -> None:
    tensors = factors(UP, EMBED, dora=True) | {PREFIX + name: torch.zeros(shape)}
    message = re.escape(f"tensor '{PREFIX}{name}' has shape {list(shape)}, and needed is {needed}")
    refuse(tmp_path, message, tensors, use_dora=True)


def test_dora_needs_its_magnitudes(tmp_path: Path) -> None:
    refuse(tmp_path, f"lacks tensor '{PREFIX}{UP}.lora_magnitude_vector'", use_dora=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["down_proj"]},
        {"target_modules": "lm_head"},
        {"exclude_modules": ["up_proj"]},
        {"exclude_modules": r".*\.mlp\..*"},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": ["blocks"]},
        {"modules_to_save": ["mlp"]},
    ],
)
def test_tensors_that_peft_would_leave_out_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    refuse(tmp_path, f"updates '{UP}', which .*adapter_config.json does not target", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, f"no tensor of '{QUERY}.bias', which was trained: bias is 'all'"),
        ({"bias": "lora_only"}, f"no tensor of '{QUERY}.bias', which was trained: bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "no tensor of 'lm_head', which was trained: modules_to_save"),
    ],
)
def test_what_was_trained_must_be_there(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    refuse(tmp_path, message, factors(UP, QUERY), **settings)


def test_an_update_of_a_tied_head_has_no_tensor_to_go_to(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    del base["lm_head.weight"]
    write_checkpoint(tmp_path / "base", {"model.safetensors": base})
    adapter = write_adapter(tmp_path / "adapter", factors(HEAD))
    with pytest.raises(CheckpointError, match=r"updates 'lm_head', which .* tied"):
        Checkpoint.open(tmp_path / "base", adapter=adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.weight"])
def test_values_that_are_not_finite_are_found_when_they_are_read(part: str, value: float, tmp_path: Path) -> None:
    tensors = factors(UP, dora=True) | {f"{PREFIX}{UP}.base_layer.weight": torch.ones(600, 24)}
    tensors[f"{PREFIX}{UP}.{part}"].view(-1)[3] = value
    write_base(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", tensors, use_dora=True))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: tensor '{PREFIX}{UP}.{part}' has 1 values that are not"):
        checkpoint.read(f"{UP}.weight")


def test_a_value_is_located_in_a_part_of_a_tensor(tmp_path: Path) -> None:
    tensors = factors(EMBED)
    tensors[f"{PREFIX}{EMBED}.lora_embedding_A"][2, 515] = float("nan")
    write_base(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", tensors))
    checkpoint.rows(f"{EMBED}.weight", 0, 512)
    with pytest.raises(CheckpointError, match=r"lora_embedding_A' has 1 values .* the first at \[2, 515\]"):
        checkpoint.rows(f"{EMBED}.weight", 512, 513)


def test_a_product_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = {name: tensor * 1e25 for name, tensor in factors(UP).items()}
    write_base(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base", adapter=write_adapter(tmp_path / "adapter", tensors))
    with pytest.raises(CheckpointError, match=f"merged into '{UP}.weight', the adapter gives values that are not"):
        checkpoint.read(f"{UP}.weight")


def test_files_that_are_missing_or_of_another_kind(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(UP))

    def refused(message: str, path: Path | str = adapter) -> None:
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / "base", adapter=path)

    refused("There is no directory", tmp_path / "absent")
    refused("no directory .* no hub id", f"{tmp_path}/absent")
    refused("is no adapter: it has no adapter_config.json", tmp_path / "base")
    config = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    (adapter / "adapter_config.json").write_text("[]", encoding="utf-8")
    refused("adapter_config.json is not usable")
    (adapter / "adapter_config.json").write_text(config, encoding="utf-8")
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:-4])
    refused(f"{WEIGHTS} is truncated")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(r"are pickles \(adapter_model\.bin\)")
    (adapter / "adapter_model.bin").unlink()
    refused(f"{WEIGHTS}, named by every adapter, is not an existing file")
    (tmp_path / WEIGHTS).write_bytes(content)
    (adapter / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    refused(f"{WEIGHTS} is a link to .* outside")
    with pytest.raises(CheckpointError, match="adapter is an adapter, not a checkpoint") as refusal:
        Checkpoint.open(adapter)
    assert f"--adapter {adapter}" in refusal.value.next_step


@pytest.mark.parametrize("more", [{}, {"config.json": {"model_type": "glm4"}}], ids=["alone", "with a config.json"])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_in_the_place_of_a_checkpoint_is_told_with_its_base(
    weights: str, more: dict[str, Any], tmp_path: Path
) -> None:
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(UP), base_model_name_or_path="THUDM/GLM-4-9B-0414")
    (adapter / WEIGHTS).rename(adapter / weights)
    for name, table in more.items():
        write_json(adapter / name, table)
    with pytest.raises(CheckpointError, match="adapter is an adapter, not a checkpoint") as refusal:
        Checkpoint.open(adapter)
    assert refusal.value.next_step == (
        f"Give the checkpoint that it was trained on (THUDM/GLM-4-9B-0414), and --adapter {adapter}."
    )
    with pytest.raises(CheckpointError, match="is no adapter") as refusal:
        Checkpoint.open(tmp_path / "base", adapter=tmp_path / "base")
    assert "a merged model is a checkpoint: give it alone" in refusal.value.next_step


@pytest.mark.parametrize(
    ("trained_on", "named"),
    [
        ("somebody/base", False),
        ("/home/somebody/base/", False),
        ("D:\\models\\Base", False),
        (None, False),
        ("", False),
        ("somebody/else", True),
    ],
)
def test_another_base_is_remarked(trained_on: str | None, named: bool, tmp_path: Path) -> None:
    progress = Silent()
    write_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter", factors(UP), base_model_name_or_path=trained_on, target_modules=["up_proj"]
    )
    Checkpoint.open(tmp_path / "base", progress, adapter)
    assert [("somebody/else" in remark, "'base'" in remark) for remark in progress.remarks] == [(True, True)] * named


def test_targets_without_tensors_and_tokenizers_are_remarked(tmp_path: Path) -> None:
    progress = Silent()
    write_base(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapter = write_tokenizer(write_adapter(tmp_path / "adapter", factors(UP), target_modules=["up_proj", "q_proj"]))
    write_json(adapter / "tokenizer_config.json", {"tokenizer_class": "Other"})
    (adapter / "training_args.bin").write_bytes(b"never read")
    Checkpoint.open(tmp_path / "base", progress, adapter)
    ignored, untouched, tokenizer = progress.remarks
    assert "training_args.bin" in ignored
    assert QUERY in untouched and "stays as it is" in untouched
    assert "tokenizer_config.json" in tokenizer and "tokenizer.json" not in tokenizer.split(";")[0]
