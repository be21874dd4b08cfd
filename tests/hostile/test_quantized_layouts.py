"""Whatever is changed in the configuration of a quantized checkpoint: it is refused in a sentence, or read."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import write_checkpoint
from compressed_files import awq, awq_table, fp8, fp8_table, group, int8, packed, table, weights
from gptq_files import Matrix, settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import EXIT_INPUT, GlmexportError

MODULE = "model.a_proj"
KEY = f"{MODULE}.weight"
MATRIX, ROW_CODES = Matrix.random(16, 64, 4, 32, False), Matrix.random(16, 64, 8, -1, True)
NUMBERS, SCALE = fp8(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), "channel")
ROWS = weights(num_bits=8, strategy="channel", symmetric=True)
LAYOUTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "gptq": (MATRIX.tensors(MODULE, "gptq"), settings(checkpoint_format="gptq", dynamic={"+:.*b": {"bits": 8}})),
    "awq": (awq(MODULE, MATRIX), awq_table()),
    "packed": (packed(MODULE, MATRIX), table(ignore=["lm_head", "re:.*gate$"])),
    "int8": (int8(MODULE, ROW_CODES, symmetric=True), table(group(ROWS), kind="int-quantized")),
    "fp8": ({KEY: NUMBERS, f"{MODULE}.weight_scale": SCALE}, fp8_table()),
    "blocks": (
        {KEY: NUMBERS, f"{KEY}_scale_inv": torch.ones(1, 2)}, {"quant_method": "fp8", "weight_block_size": [16, 32]}
    ),
}  # fmt: skip
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)
    | st.sampled_from([
        -1, 0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 1 << 31, 1 << 62, "group", "channel", "tensor", "block", "int", "float",
        "re:(a|aa)+$", {}, [[]], [0, 0], [16, 32], [-1, 1], [1 << 31, 32], [16, 1 << 31],
    ])
)  # fmt: skip
QUICKLY = hypothesis_settings(
    max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``value`` with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def refused_or_read(directory: Path) -> None:
    try:
        opened = Checkpoint.open(directory)
        opened.read(KEY)
        if KEY in opened.quantized:
            opened.codes(KEY, 3, 11)
    except GlmexportError as error:
        assert error.exit_code == EXIT_INPUT and error.next_step
        assert "\n" not in error.message and len(error.message) < 2000, error.message


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
@QUICKLY
def test_another_value_in_the_configuration(layout: str, tmp_path: Path, data: st.DataObject) -> None:
    tensors, original = LAYOUTS[layout]
    changed = copy.deepcopy(original)
    container, key = data.draw(st.sampled_from(list(places(changed))))
    if data.draw(st.booleans()):
        container[key] = data.draw(VALUES)
    else:
        del container[key]
    if not (tmp_path / "model.safetensors").exists():
        write_checkpoint(tmp_path, {"model.safetensors": tensors})
    config = {"model_type": "glm4", "quantization_config": changed}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused_or_read(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(12))
def test_another_tensor_in_the_files(layout: str, seed: int, tmp_path: Path) -> None:
    tensors, original = LAYOUTS[layout]
    config = {"model_type": "glm4", "quantization_config": original}
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config=config)
    chance = random.Random(seed)
    for name in tensors:
        kind = chance.choice([torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float8_e4m3fn])
        shape = chance.choice([(), (0,), (1,), (2,), (16,), (16, 0), (16, 1), (16, 64), (64, 16), (2, 16, 64)])
        other = torch.full(shape, chance.choice([0.0, -1.0, 100.0, float("nan")])).nan_to_num(0 if seed % 2 else -7)
        save_file({**load_file(tmp_path / "model.safetensors"), name: other.to(kind)}, tmp_path / "model.safetensors")
        refused_or_read(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        without = {key: tensor for key, tensor in tensors.items() if key != name}
        if without:
            save_file(without, tmp_path / "model.safetensors")
            refused_or_read(tmp_path)
            save_file(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_changed_is_read(layout: str, tmp_path: Path) -> None:
    tensors, original = LAYOUTS[layout]
    config = {"model_type": "glm4", "quantization_config": original}
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, config=config)
    assert Checkpoint.open(tmp_path).read(KEY).shape == (16, 64)
