"""Latent attention in fp32 computes what transformers computes, whichever of the two caches holds the past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from builds import carried
from models import MIXTURE, write_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.assembly.external import write_graphs
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import open_target
from glmexport.graph.build import build_graph
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

TOLERANCE = 1e-4
CAPACITY = 40
INDEXED = {
    "index_topk": 8,
    "index_n_heads": 32,
    "index_head_dim": 24,
    "num_hidden_layers": 5,
    "indexer_types": ["full", "shared", "full", "shared", "shared"],
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
    }
}
#: Mixtures of experts behind one dense layer.
SPARSE = {**MIXTURE, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"], "num_hidden_layers": 5}
#: Checkpoint, and whether latents are cached.
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lite, heads": ("glm4_moe_lite", {}, False),
    "lite, latent": ("glm4_moe_lite", {}, True),
    "lite, wide values, bias, heads": ("glm4_moe_lite", {"v_head_dim": 48, "attention_bias": True}, False),
    "lite, wide values, bias, latent": ("glm4_moe_lite", {"v_head_dim": 48, "attention_bias": True}, True),
    "lite, yarn, half rotation, heads": ("glm4_moe_lite", {"rope_interleave": False, **YARN}, False),
    "lite, yarn, half rotation, latent": ("glm4_moe_lite", {"rope_interleave": False, **YARN}, True),
    "lite, whole queries, tied": ("glm4_moe_lite", {"q_lora_rank": None, "tie_word_embeddings": True}, True),
    "lite, experts": ("glm4_moe_lite", SPARSE, True),
    "dsa, experts": ("glm_moe_dsa", {**INDEXED, **SPARSE}, True),
    "dsa": ("glm_moe_dsa", INDEXED, True),
    "dsa, yarn": ("glm_moe_dsa", {**INDEXED, **YARN}, True),
}


class Session:
    """A graph with either cache, called as a decode loop calls it."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.caches = [entry for entry in self.session.get_inputs() if entry.name.startswith("past")]

    def __call__(self, ids: np.ndarray, mask: np.ndarray, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        if past is None:
            past = [np.zeros(self.shape(entry, len(ids)), np.float32) for entry in self.caches]
        inputs = {entry.name: value for entry, value in zip(self.caches, past, strict=True)}
        return list(self.session.run(carried(self.session), {"input_ids": ids, "attention_mask": mask, **inputs}))

    @staticmethod
    def shape(entry: Any, batch: int) -> tuple[int, ...]:
        lengths = {"past_sequence": 0, "capacity": CAPACITY, "batch": batch}
        return tuple(lengths.get(size, size) for size in entry.shape)


def export(path: Path, out: Path, latent_cache: bool) -> dict[str, Session]:
    checkpoint = Checkpoint.open(path)
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    assert architecture.account(checkpoint) == []
    target = open_target("x86-avx2")
    limits = target.graph.model_copy(update={"latent_cache": latent_cache})
    target = target.model_copy(update={"graph": limits})
    weights = Weights(checkpoint, architecture, None, [])
    tables = Reference(checkpoint, architecture).rotary_tables(architecture.context_length)
    graphs = {
        name: lower(build_graph(architecture, target.graph, every_position=every), target, weights, tables)
        for name, every in (("model.onnx", False), ("scoring.onnx", True))
    }
    write_graphs(graphs, out, Silent())
    return {name: Session(out / name) for name in graphs}


def test_what_selects_everything_is_dense_attention(tmp_path: Path) -> None:
    """The same weights with an indexer that may choose 24 tokens, and without one: alike up to 24 tokens."""
    write_checkpoint(tmp_path / "sparse", "glm_moe_dsa", **{**INDEXED, "index_topk": 24})
    weights = load_file(tmp_path / "sparse" / "model.safetensors")
    write_checkpoint(tmp_path / "dense", "glm4_moe_lite", num_hidden_layers=INDEXED["num_hidden_layers"])
    dense = {name: tensor for name, tensor in weights.items() if "indexer" not in name}
    save_file(dense, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    sessions = [
        export(tmp_path / name, tmp_path / f"{name}-bundle", latent_cache)["scoring.onnx"]
        for name, latent_cache in (("sparse", True), ("dense", True), ("dense", False))
    ]
    ids = np.random.default_rng(5).integers(0, 250, (1, 36))
    sparse, *others = (session(ids, np.ones_like(ids))[0] for session in sessions)
    for logits in others:
        assert np.abs(logits[:, :24] - sparse[:, :24]).max() <= TOLERANCE
        assert np.abs(logits[:, 24:] - sparse[:, 24:]).max() > 10 * TOLERANCE


def original(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def exported(request, tmp_path_factory):
    family, changes, latent_cache = VARIANTS[request.param]
    path = tmp_path_factory.mktemp("checkpoint")
    model = write_checkpoint(path, family, **changes)
    return model, export(path, tmp_path_factory.mktemp("bundle"), latent_cache)


def test_one_pass(exported) -> None:
    model, sessions = exported
    ids = np.random.default_rng(1).integers(0, 250, (2, 36))
    expected = original(model, ids)
    (logits, *_) = sessions["scoring.onnx"](ids, np.ones_like(ids))
    assert np.abs(logits - expected).max() <= TOLERANCE
    (last, *_) = sessions["model.onnx"](ids, np.ones_like(ids))
    assert last.shape == (2, 1, expected.shape[2])
    assert np.abs(last[:, 0] - expected[:, -1]).max() <= TOLERANCE


def test_prefill_and_decode(exported) -> None:
    model, sessions = exported
    session = sessions["model.onnx"]
    ids = np.random.default_rng(2).integers(0, 250, (1, 24))
    expected = original(model, ids)
    logits, *past = session(ids[:, :5], np.ones((1, 5), np.int64))
    assert np.abs(logits[:, -1] - expected[:, 4]).max() <= TOLERANCE
    # A prefill that continues a cache, then single steps.
    logits, *past = session(ids[:, 5:16], np.ones((1, 16), np.int64), past)
    assert np.abs(logits[:, -1] - expected[:, 15]).max() <= TOLERANCE
    for position in range(16, 24):
        mask = np.ones((1, position + 1), np.int64)
        logits, *past = session(ids[:, position : position + 1], mask, past)
        assert np.abs(logits[:, -1] - expected[:, position]).max() <= TOLERANCE


def test_padded_batch(exported) -> None:
    model, sessions = exported
    session = sessions["model.onnx"]
    rng = np.random.default_rng(3)
    long, short = rng.integers(0, 250, (1, 16)), rng.integers(0, 250, (1, 9))
    ids = np.concatenate([long[:, :12], np.pad(short[:, :5], ((0, 0), (0, 7)))])
    mask = (np.arange(12)[None] < np.array([[12], [5]])).astype(np.int64)
    expected = [original(model, row) for row in (long, short)]
    (every, *_) = sessions["scoring.onnx"](ids, mask)
    assert np.abs(every[0] - expected[0][0, :12]).max() <= TOLERANCE
    assert np.abs(every[1, :5] - expected[1][0, :5]).max() <= TOLERANCE
    logits, *past = session(ids, mask)
    # Where our own loop decodes, a step this short gives the logits of all positions.
    assert np.abs(logits[0, -1] - expected[0][0, 11]).max() <= TOLERANCE
    assert np.abs(logits[1, min(4, logits.shape[1] - 1)] - expected[1][0, 4]).max() <= TOLERANCE
    for step in range(4):
        tokens = np.stack([long[0, 12 + step : 13 + step], short[0, 5 + step : 6 + step]])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        logits, *past = session(tokens, mask, past)
        assert np.abs(logits[0, 0] - expected[0][0, 12 + step]).max() <= TOLERANCE
        assert np.abs(logits[1, 0] - expected[1][0, 5 + step]).max() <= TOLERANCE
