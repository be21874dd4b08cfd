"""Against the real library: checkpoints by GPTQModel are read exactly, and ours are loaded by it and by transformers.

Needs an interpreter that has gptqmodel, in an environment of its own because of what it pins:

    python3 -m venv /tmp/gptqmodel && /tmp/gptqmodel/bin/pip install torch==2.13.0 "gptqmodel==7.6.*" "optimum==2.3.*"
    GLMEXPORT_GPTQMODEL_PYTHON=/tmp/gptqmodel/bin/python pytest tests/interop
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builds import bundle_weights
from interop_jobs import IDS, OURS, SETTINGS, build_unvalidated
from safetensors.torch import load_file
from torch import Tensor

from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Silent
from glmexport.reference.reference import Reference
from glmexport.workflows.original import Original

READABLE = [name for name in SETTINGS if name != "act-order"]
WRITTEN = [f"{recipe}-{library}" for recipe in OURS for library in ("gptqmodel", "transformers")]


def weight(original: Original, module: str) -> Tensor:
    """Our dequantized matrix of a module of theirs, where gate and up may be apart."""
    if f"{module}.weight" in original.checkpoint.tensors:
        return original.checkpoint.read(f"{module}.weight")
    parent, _, half = module.rpartition(".")
    stacked = original.checkpoint.read(f"{parent}.gate_up_proj.weight")
    return stacked.chunk(2)[("gate_proj", "up_proj").index(half)]


def logits(original: Original) -> Tensor:
    """Of our reference arithmetic, fp32."""
    reference = Reference(original.checkpoint, original.architecture)
    hidden, positions = reference.embed(torch.tensor([IDS])), reference.position_embeddings(len(IDS))
    for layer in original.architecture.layers:
        hidden = reference.block(layer).forward(hidden, positions)
    return reference.logits(reference.final_norm(hidden))[0]


def compare(checkpoint: Path, dump: Path) -> None:
    original, theirs = Original.open(str(checkpoint), Silent()), load_file(dump)
    modules = [name.removesuffix(".dequantized") for name in theirs if name.endswith(".dequantized")]
    assert len(modules) >= 36
    for module in modules:
        # The library multiplies in fp16, we in fp32, which is exact: rounding ours must give theirs.
        assert torch.equal(weight(original, module).half(), theirs[f"{module}.dequantized"]), module
    ours = logits(original)
    assert float((ours - theirs["logits"]).abs().max()) < 1e-4
    # The kernel that it picks by itself rounds scales and activations to bf16.
    assert float((ours - theirs["default_logits"]).abs().max()) < 0.25


@pytest.mark.parametrize("name", READABLE)
def test_its_checkpoints_are_read_as_it_reads_them(place: Path, name: str) -> None:
    compare(place / "theirs" / name, place / "dumps" / f"theirs-{name}.safetensors")


@pytest.mark.parametrize("name", READABLE)
def test_bundles_of_its_checkpoints_keep_every_code(place: Path, tmp_path: Path, name: str) -> None:
    source = place / "theirs" / name
    bundle = build_unvalidated(source, tmp_path / "bundle", "stored")
    weights, original = bundle_weights(bundle, source), Original.open(str(source), Silent())
    tensors = load_file(source / "model.safetensors")
    assert len(original.checkpoint.quantized) == 36
    for key in original.checkpoint.quantized:
        linear = weights.quantized(key)
        assert linear is not None
        assert torch.equal(linear.dequantize(), original.checkpoint.read(key))
        module = key.removesuffix(".weight")
        names = [module]
        if module.endswith("gate_up_proj"):
            names = [module.replace("gate_up", half) for half in ("gate", "up")]
        shifts = torch.arange(0, 32, 4)[None, :, None]
        codes = [(tensors[f"{part}.qweight"][:, None] >> shifts & 15).flatten(0, 1).T for part in names]
        assert torch.equal(linear.codes.int(), torch.cat(codes))
        assert torch.equal(linear.scales, torch.cat([tensors[f"{part}.scales"].T for part in names]))


def test_act_order_is_refused(place: Path) -> None:
    with pytest.raises(CheckpointError, match="act-order"):
        Original.open(str(place / "theirs" / "act-order"), Silent())


@pytest.mark.parametrize("name", WRITTEN)
def test_our_checkpoints_are_loaded(place: Path, name: str) -> None:
    compare(place / "written" / name, place / "dumps" / f"{name}.safetensors")
