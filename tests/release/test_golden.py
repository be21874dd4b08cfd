"""Golden answers are what the graph computes; a device may differ in rounding, and in nothing else."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import THREADS, Sample, build, small_checkpoint, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from signatures import Pair, sha256

from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import shipped_languages
from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.host import Host
from glmexport.foundation.progress import Silent
from glmexport.release.golden import GOLDEN, Golden, GoldenAnswer, GoldenStep, compare, record
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.release.release import read_release
from glmexport.workflows.sign import golden_texts, sign_bundle

#: Nats: activations are quantized to int8, and one row or many round differently.
ROUNDING = 0.03


def check_against_scoring(bundle: Path, golden: Golden) -> None:
    """Every log-probability is that of scoring.onnx, which computes all positions at once."""
    scoring = ScoringSession(Bundle.open(bundle), THREADS)
    for answer in golden.answers:
        tokens = [step.token for step in answer.steps]
        logits = torch.from_numpy(scoring.logits(np.array([*answer.prompt, *tokens])))
        expected = logits.double().log_softmax(-1)[len(answer.prompt) - 1 : -1].numpy()
        assert tokens and len(expected) == len(tokens)
        for step, row in zip(answer.steps, expected, strict=True):
            found = np.array([logprob for _, logprob in step.top])
            np.testing.assert_allclose(found, row[[token for token, _ in step.top]], atol=ROUNDING)
            np.testing.assert_allclose(found, np.sort(row)[::-1][: len(found)], atol=ROUNDING)
            assert step.top[0] == (step.token, step.logprob)


def test_what_is_recorded_is_what_the_graph_computes(signed: Path) -> None:
    golden = Golden.model_validate_json((signed / GOLDEN).read_bytes())
    assert {answer.language for answer in golden.answers} == set(shipped_languages())
    assert len(golden.answers) >= 12
    assert read_release(signed).golden == f"sha256:{sha256(signed / GOLDEN)}"
    check_against_scoring(signed, golden)
    session = GenerationSession.open(Bundle.open(signed), THREADS)
    for answer in golden.answers[:4]:
        assert session.tokens(answer.prompt, 16) == [step.token for step in answer.steps]


def test_our_own_loop_is_recorded_too(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint", "glm4_moe_lite")
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", write_recipe(tmp_path))
    assert (built.directory / "loop.json").is_file()
    golden = record(Bundle.open(built.directory), golden_texts(), THREADS, Silent())
    check_against_scoring(built.directory, golden)


def test_where_the_bundle_does_not_run_nothing_is_recorded(
    sample: Sample, keys: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    elsewhere = Host("x86_64", providers=("CUDAExecutionProvider",))
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: elsewhere))
    progress = Silent()
    sign_bundle(Bundle.open(bundle), open_signatory(KeyFiles(keys.private)), counter=1, progress=progress)
    reason = str(read_release(bundle).golden_absent_because)
    assert "CPUExecutionProvider" in reason and not (bundle / GOLDEN).exists()
    assert progress.remarks == [f"No golden answers are recorded. {reason}"]


TOP = ((5, -0.5), (6, -1.0), (7, -3.0))
ANSWER = GoldenAnswer(language="en", prompt=(1,), steps=(GoldenStep(token=5, logprob=-0.5, top=TOP),) * 3)
SAME = dict(TOP)


def test_the_same_answer_is_golden() -> None:
    assert compare(ANSWER, [5, 5, 5], [SAME] * 3) is None
    assert compare(ANSWER, [5, 5, 5, 9], [SAME, SAME, SAME, {}]) is None


@pytest.mark.parametrize("apart,same", [(0.5, True), (-0.5, True), (0.51, False), (-0.51, False), (math.nan, False)])
def test_the_same_token_has_nearly_the_same_probability(apart: float, same: bool) -> None:
    why = compare(ANSWER, [5, 5, 5], [SAME, {5: -0.5 + apart}, SAME])
    assert (why is None) == same
    assert same or "at token 2 of 3" in str(why)


@pytest.mark.parametrize(
    "logprobs,same",
    [
        ({6: -0.6, 5: -0.7}, True),
        ({6: -0.6, 5: -1.05}, True),
        ({6: -0.6, 5: -1.2}, False),
        ({6: -0.6}, False),
        ({5: -0.6}, False),
        ({6: math.nan, 5: -0.6}, False),
        ({}, False),
    ],
)
def test_another_token_was_nearly_as_likely(logprobs: dict[int, float], same: bool) -> None:
    """And what follows it is not compared."""
    assert (compare(ANSWER, [5, 6, 1], [SAME, logprobs, {1: -9.0}]) is None) == same


def test_an_answer_that_ends_early_is_another() -> None:
    assert "ends" in str(compare(ANSWER, [5, 5], [SAME] * 2))
    assert "ends" in str(compare(ANSWER, [5, 5, 5], [SAME] * 2))
    assert "ends" in str(compare(ANSWER, [], []))


LOGPROBS = st.floats(-20, 0)


@given(st.lists(st.tuples(st.integers(0, 9), LOGPROBS, LOGPROBS), min_size=1, max_size=6), st.floats(0, 2))
def test_an_answer_agrees_with_itself_and_with_noise_below_the_tolerance(
    rows: list[tuple[int, float, float]], tolerance: float
) -> None:
    steps = tuple(GoldenStep(token=token, logprob=logprob, top=((token, logprob),)) for token, logprob, _ in rows)
    answer = GoldenAnswer(language="en", prompt=(1,), steps=steps)
    tokens = [step.token for step in steps]
    shifted = [{token: other} for token, _, other in rows]
    near = all(abs(logprob - other) <= tolerance for _, logprob, other in rows)
    assert compare(answer, tokens, [{step.token: step.logprob} for step in steps], tolerance) is None
    assert (compare(answer, tokens, shifted, tolerance) is None) == near
