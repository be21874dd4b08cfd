"""The fp32 draft graph computes the formula of multi-token prediction over transformers' own decoder layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from predicting import PREDICTING, Predicting

from glmexport.assembly.external import write_graphs
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import open_target
from glmexport.graph.build import build_draft, build_graph
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

TOLERANCE = 1e-4
CAPACITY = 40


@pytest.fixture(scope="module", params=PREDICTING)
def exported(request, tmp_path_factory) -> tuple[Predicting, dict[str, onnxruntime.InferenceSession]]:
    family, changes = PREDICTING[request.param]
    predicting = Predicting(tmp_path_factory.mktemp("checkpoint"), family, **changes)
    checkpoint = Checkpoint.open(predicting.path)
    architecture = describe(checkpoint)
    checkpoint = architecture.presented(checkpoint)
    assert architecture.account(checkpoint) == []
    target = open_target("x86-avx2")
    weights = Weights(checkpoint, architecture, None, [])
    tables = Reference(checkpoint, architecture).rotary_tables(architecture.context_length)
    built = {
        "model.onnx": build_graph(architecture, target.graph, every_position=False),
        "draft.onnx": build_draft(architecture, target.graph),
    }
    out: Path = tmp_path_factory.mktemp("bundle")
    write_graphs({name: lower(graph, target, weights, tables) for name, graph in built.items()}, out, Silent())
    return predicting, {name: onnxruntime.InferenceSession(out / name) for name in built}


def run(session: onnxruntime.InferenceSession, total: int, past: list[np.ndarray] | None, **inputs: np.ndarray):
    """Outputs by name, and the caches."""
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key")]
    sizes = {"batch": 1, "past_sequence": 0, "capacity": CAPACITY}
    if past is None:
        past = [np.zeros([sizes.get(size, size) for size in value.shape], np.float32) for value in caches]
    feeds = {value.name: array for value, array in zip(caches, past, strict=True)}
    names = [value.name for value in session.get_outputs()]
    given = session.run(None, {"attention_mask": np.ones((1, total), np.int64), **inputs, **feeds})
    outputs = dict(zip(names, given, strict=True))
    return outputs, [outputs[name] for name in names if name.startswith("present")]


def test_hidden_states_and_logits_of_short_steps_leave_the_model(exported) -> None:
    predicting, sessions = exported
    ids = np.random.default_rng(1).integers(0, 250, (1, 30))
    expected = predicting.hidden(torch.from_numpy(ids))
    logits = predicting.model.lm_head(expected).numpy()
    outputs, past = run(sessions["model.onnx"], 20, None, input_ids=ids[:, :20])
    assert np.abs(outputs["hidden_states"] - expected[:, :20].numpy()).max() <= TOLERANCE
    recent = outputs.get("recent_logits", outputs["logits"])
    assert recent.shape[:2] == outputs["logits"].shape[:2] == (1, 1)
    assert np.abs(outputs["logits"][:, -1] - logits[:, 19]).max() <= TOLERANCE
    outputs, _ = run(sessions["model.onnx"], 30, past, input_ids=ids[:, 20:])
    recent = outputs.get("recent_logits", outputs["logits"])
    assert recent.shape[1] == 10 and np.abs(recent - logits[:, 20:]).max() <= TOLERANCE
    assert np.array_equal(outputs["logits"][:, -1], recent[:, -1])


def test_the_draft_graph_is_the_formula(exported) -> None:
    """In one pass, then going on with caches, and applied again to what it gave."""
    predicting, sessions = exported
    session = sessions["draft.onnx"]
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 250, (1, 31)))
    hidden = predicting.hidden(ids)[:, :-1]
    following = ids[:, 1:]
    expected, states = predicting(following, hidden)
    past = None
    for start, stop in ((0, 20), (20, 21), (21, 30)):
        part = {"input_ids": following[:, start:stop].numpy(), "past_hidden_states": hidden[:, start:stop].numpy()}
        outputs, past = run(session, stop, past, **part)
        assert outputs["logits"].shape[:2] == (1, 1)
        assert np.abs(outputs["logits"][0, 0] - expected[0, stop - 1].numpy()).max() <= TOLERANCE
        assert np.abs(outputs["hidden_states"][0, 0] - states[0, stop - 1].numpy()).max() <= TOLERANCE
    guess = expected[:, -1].argmax(-1)[:, None]
    again, _ = predicting(torch.cat([following, guess], 1), torch.cat([hidden, states[:, -1:]], 1))
    outputs, _ = run(session, 31, past, input_ids=guess.numpy(), past_hidden_states=outputs["hidden_states"])
    assert np.abs(outputs["logits"][0, 0] - again[0, -1].numpy()).max() <= TOLERANCE


def test_the_order_of_the_halves_matters(exported) -> None:
    """So that the parity above could not hold with the hidden state first."""
    predicting, _ = exported
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 250, (1, 12)))
    hidden = predicting.hidden(ids)[:, :-1]
    right, _ = predicting(ids[:, 1:], hidden)
    first, second = predicting.projection.chunk(2, 1)
    swapped = torch.cat([second, first], 1)
    kept, predicting.projection = predicting.projection, swapped
    wrong, _ = predicting(ids[:, 1:], hidden)
    predicting.projection = kept
    assert float((right - wrong).abs().max()) > 100 * TOLERANCE
