"""The fp32 graph computes what transformers computes: the one place where our arithmetic meets the original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from builds import carried
from models import MIXTURE, write_checkpoint
from transformers import AutoModelForCausalLM

from glmexport.assembly.external import write_graphs
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.demo import demo_checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import open_target
from glmexport.graph.build import build_graph
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

TOLERANCE = 1e-4


def export(path: Path, out: Path, packed: bool = True) -> onnxruntime.InferenceSession:
    checkpoint = Checkpoint.open(path)
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    target = open_target("x86-avx2")
    if not packed:
        target = target.model_copy(update={"graph": target.graph.model_copy(update={"packed_qkv": False})})
    weights = Weights(checkpoint, architecture, None, [])
    tables = Reference(checkpoint, architecture).rotary_tables(architecture.context_length)
    graphs = {
        name: lower(build_graph(architecture, target.graph, every_position=every), target, weights, tables)
        for name, every in (("model.onnx", False), ("scoring.onnx", True))
    }
    write_graphs(graphs, out, Silent())
    return {name: onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"]) for name in graphs}


def feeds(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, past=None) -> dict:
    inputs = {"input_ids": ids, "attention_mask": mask}
    for index, value in enumerate(entry for entry in session.get_inputs() if entry.name.startswith("past")):
        empty = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), np.float32)
        inputs[value.name] = empty if past is None else past[index]
    return inputs


def original(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()


VARIANTS = {
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4 without bias, tied": ("glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    "glm with yarn": (
        "glm",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "glm4_moe": ("glm4_moe", MIXTURE),
    "glm4_moe with qk-norm": ("glm4_moe", MIXTURE | {"use_qk_norm": True, "norm_topk_prob": False}),
    "glm4_moe in one group, two dense layers": (
        "glm4_moe",
        MIXTURE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 2},
    ),
}


@pytest.fixture(scope="module", params=[*VARIANTS, "demo"], ids=lambda name: name.replace(" ", "-"))
def exported(request, tmp_path_factory):
    if request.param == "demo":
        path = demo_checkpoint()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    else:
        model_type, changes = VARIANTS[request.param]
        path = tmp_path_factory.mktemp("checkpoint")
        model = write_checkpoint(path, model_type, **changes)
    return model, export(path, tmp_path_factory.mktemp("bundle"))


def test_one_pass(exported) -> None:
    model, sessions = exported
    ids = np.random.default_rng(1).integers(0, 250, (2, 48))
    mask = np.ones_like(ids)
    expected = original(model, ids, mask)
    (logits, *_) = sessions["scoring.onnx"].run(None, feeds(sessions["scoring.onnx"], ids, mask))
    assert np.abs(logits - expected).max() <= TOLERANCE
    (last, *_) = sessions["model.onnx"].run(None, feeds(sessions["model.onnx"], ids, mask))
    assert last.shape == (2, 1, expected.shape[2])
    assert np.abs(last[:, 0] - expected[:, -1]).max() <= TOLERANCE


def test_prefill_and_decode(exported) -> None:
    model, sessions = exported
    session = sessions["model.onnx"]
    ids = np.random.default_rng(2).integers(0, 250, (1, 24))
    expected = original(model, ids, np.ones_like(ids))
    logits, *past = session.run(carried(session), feeds(session, ids[:, :10], np.ones((1, 10), np.int64)))
    assert np.abs(logits[:, 0] - expected[:, 9]).max() <= TOLERANCE
    # A prefill that continues a cache, then single steps.
    logits, *past = session.run(carried(session), feeds(session, ids[:, 10:16], np.ones((1, 16), np.int64), past))
    assert np.abs(logits[:, 0] - expected[:, 15]).max() <= TOLERANCE
    for position in range(16, 24):
        mask = np.ones((1, position + 1), np.int64)
        logits, *past = session.run(carried(session), feeds(session, ids[:, position : position + 1], mask, past))
        assert np.abs(logits[:, 0] - expected[:, position]).max() <= TOLERANCE


def test_padded_batch(exported) -> None:
    model, sessions = exported
    session = sessions["model.onnx"]
    rng = np.random.default_rng(3)
    long, short = rng.integers(0, 250, (1, 16)), rng.integers(0, 250, (1, 9))
    ids = np.concatenate([long[:, :12], np.pad(short[:, :5], ((0, 0), (0, 7)))])
    mask = (np.arange(12)[None] < np.array([[12], [5]])).astype(np.int64)
    expected = [original(model, row, np.ones_like(row)) for row in (long, short)]
    (every, *_) = sessions["scoring.onnx"].run(None, feeds(sessions["scoring.onnx"], ids, mask))
    assert np.abs(every[0] - expected[0][0, :12]).max() <= TOLERANCE
    assert np.abs(every[1, :5] - expected[1][0, :5]).max() <= TOLERANCE
    logits, *past = session.run(carried(session), feeds(session, ids, mask))
    assert np.abs(logits[0, 0] - expected[0][0, 11]).max() <= TOLERANCE
    assert np.abs(logits[1, 0] - expected[1][0, 4]).max() <= TOLERANCE
    for step in range(4):
        tokens = np.stack([long[0, 12 + step : 13 + step], short[0, 5 + step : 6 + step]])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        logits, *past = session.run(carried(session), feeds(session, tokens, mask, past))
        assert np.abs(logits[0, 0] - expected[0][0, 12 + step]).max() <= TOLERANCE
        assert np.abs(logits[1, 0] - expected[1][0, 5 + step]).max() <= TOLERANCE


def test_separate_projections_compute_the_same(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint")
    session = export(tmp_path / "checkpoint", tmp_path / "bundle", packed=False)["scoring.onnx"]
    ids = np.random.default_rng(4).integers(0, 250, (1, 20))
    mask = np.ones_like(ids)
    (logits, *_) = session.run(carried(session), feeds(session, ids, mask))
    assert np.abs(logits - original(model, ids, mask)).max() <= TOLERANCE
