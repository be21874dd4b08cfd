"""Bundles of fixed shapes, from checkpoint to tokens, beside bundles of the same weights for any length."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import (
    FORMATS,
    THREADS,
    Run,
    build,
    bundle_weights,
    small_checkpoint,
    write_fixed_target,
    write_recipe,
    write_target,
)

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import FixedLoopConfig, read_loop
from glmexport.bundle.manifest import read_manifest
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.job import PromptQuestion, SpeedRequest, TextQuestion, read_job, write_job
from glmexport.devices.local import LocalRunner
from glmexport.devices.web_limits import check_limits
from glmexport.engine.generation import GenerationSession
from glmexport.engine.opening import open_engine
from glmexport.engine.scoring import ScoringSession
from glmexport.engine.speculation import open_speculation
from glmexport.foundation.errors import EXIT_INPUT, BundleError, InputError
from glmexport.foundation.host import CPU_PROVIDER
from glmexport.foundation.progress import Silent
from glmexport.validation.runtimes import RuntimeRequest
from glmexport.validation.speed import take_turns
from glmexport.workflows.validate import Built

SIGNED = FORMATS.replace("group_size = 32", "group_size = 32\nsymmetric = true", 2)
NEAREST = f'summary = "Rounded"\n{SIGNED}\n[solver]\nmethod = "round-to-nearest"\n'
CHUNK, CONTEXT = 16, 96
PROMPT = np.random.default_rng(0).integers(0, 250, CONTEXT).tolist()


@dataclass(frozen=True)
class Pair:
    """Bundles of one checkpoint in fp32 arithmetic, and the model in transformers."""

    model: Any
    checkpoint: Path
    fixed: Built
    any: Built


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    model = small_checkpoint(base / "checkpoint", eos_token_id=[256])
    exact = write_target(base, {"accuracy_level = 4": "accuracy_level = 0"}, "any")
    targets = write_fixed_target(base, CHUNK, CONTEXT), exact
    recipe = write_recipe(base, NEAREST)
    fixed, plain = build(base / "checkpoint", base / "bundles", recipe, targets=tuple(map(str, targets)))
    return Pair(model, base / "checkpoint", fixed, plain)


def test_a_bundle_has_the_file_of_its_loop_and_a_graph_for_each_number_of_positions(pair: Pair) -> None:
    files = {path.name for path in pair.fixed.directory.iterdir()}
    assert {"model.onnx", "step.onnx", "scoring.onnx", "loop.json"} <= files and "genai_config.json" not in files
    config = read_loop(pair.fixed.directory)
    assert isinstance(config, FixedLoopConfig)
    assert (config.chunk, config.context_length) == (CHUNK, CONTEXT) and len(config.caches) == 4
    manifest = read_manifest(pair.fixed.directory)
    assert manifest.context_length == CONTEXT < read_manifest(pair.any.directory).context_length
    # Transposed codes of a tied table aside, as many bytes of weights as one graph needs.
    sizes = [
        sum(file.size for file in read_manifest(built.directory).files if file.path.startswith("weights/"))
        for built in (pair.fixed, pair.any)
    ]
    assert sizes[0] < 1.1 * sizes[1]


def test_a_server_goes_on_with_what_it_computed(pair: Pair) -> None:
    """In pieces that begin anywhere, and up to the last position, where no whole chunk has room any more."""
    engine = open_engine(Bundle.open(pair.fixed.directory), THREADS)
    whole = ScoringSession(Bundle.open(pair.fixed.directory), THREADS).logits(np.array(PROMPT))
    sequence = engine.begin(CONTEXT)
    assert (engine.chunk, engine.short_step, sequence.capacity) == (CHUNK, 1, CONTEXT)
    done = 0
    for count in (5, 1, CHUNK, 30, 3, CONTEXT - 55):
        logits = sequence.advance(PROMPT[done : done + count])
        done += count
        assert logits.shape == (1, whole.shape[1])
        np.testing.assert_allclose(logits[0], whole[done - 1], atol=1e-4)
        if count == 30:
            # Another continuation, and back.
            sequence.forget(20)
            sequence.advance([7, 8, 9])
            sequence.forget(3)
            done -= 20
            sequence.advance(PROMPT[done : done + 20])
            done += 20
    assert sequence.tokens == PROMPT


def test_logits_and_tokens_are_those_of_graphs_of_any_length(pair: Pair) -> None:
    """One through our loop and one through onnxruntime-genai; prompts within a chunk, at its end and behind it."""
    ids = np.array(PROMPT[:90])
    fixed, plain = (
        ScoringSession(Bundle.open(built.directory), THREADS).logits(ids)
        for built in (pair.fixed, pair.any)
    )
    assert np.abs(fixed - plain).max() <= 1e-4
    ours, theirs = (GenerationSession.open(Bundle.open(built.directory), THREADS) for built in (pair.fixed, pair.any))
    assert (ours.context_length, ours.ends) == (CONTEXT, theirs.ends)
    generated = 0
    for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 40):
        tokens = ours.tokens(PROMPT[:length], 24)
        assert tokens == theirs.tokens(PROMPT[:length], 24), length
        generated += len(tokens)
    assert generated > 60


def test_the_end_of_the_context_ends_an_answer(pair: Pair) -> None:
    ours, theirs = (GenerationSession.open(Bundle.open(built.directory), THREADS) for built in (pair.fixed, pair.any))
    for length in (CONTEXT - 20, CONTEXT - 1):
        tokens = ours.tokens(PROMPT[:length], 30)
        assert tokens == theirs.tokens(PROMPT[:length], CONTEXT - length)
        assert 0 < len(tokens) <= CONTEXT - length
    with pytest.raises(InputError, match="96 tokens and the context 96"):
        ours.tokens(PROMPT, 1)


def test_sequences_together_are_those_alone(pair: Pair) -> None:
    session = GenerationSession.open(Bundle.open(pair.fixed.directory), THREADS)
    prompts = [PROMPT[start : start + 20] for start in (0, 30, 70)]
    assert session.together(prompts, [16] * len(prompts)) == [session.tokens(prompt, 16) for prompt in prompts]


def test_every_number_can_be_read_back(pair: Pair) -> None:
    records = {matrix.key: matrix.digest for matrix in read_manifest(pair.fixed.directory).matrices}
    weights = bundle_weights(pair.fixed.directory, pair.checkpoint)
    assert set(weights.quantized_keys) == set(records) and len(records) > 10
    for key, digest in records.items():
        linear = weights.quantized(key)
        assert linear is not None and linear.digest() == digest, key


def test_validation_finds_what_it_finds_of_the_other(pair: Pair) -> None:
    fixed, plain = pair.fixed.report, pair.any.report
    assert fixed.weights is not None and fixed.weights.faults == () and fixed.weights.matrices > 10
    assert fixed.fidelity.overall.positions == plain.fidelity.overall.positions > 0
    assert fixed.fidelity.overall.kl_mean_nats == pytest.approx(plain.fidelity.overall.kl_mean_nats, abs=1e-4)
    assert {gate.name for gate in fixed.gates} >= {"Tensors that were changed", "Prompts with other tokens"}


def test_speed_and_placement_are_those_of_the_loop(pair: Pair) -> None:
    request = RuntimeRequest(
        runtime="onnxruntime-genai",
        directory=str(pair.fixed.directory),
        prompt=tuple(PROMPT[:20]),
        generated_tokens=4,
        threads=THREADS,
    )
    (turns,) = take_turns([request], 0, Silent())
    assert "in fixed shapes" in turns.runtime
    assert all(len(taken.steps_s) == 3 and taken.ttft_s > 0 for taken in turns.rounds)
    assert {node.provider for node in turns.nodes} == {CPU_PROVIDER}
    scattered = [node.name for node in turns.nodes if node.operator == "ScatterND"]
    # Key and value of two layers, of either graph.
    assert len(scattered) == 8 and len(set(scattered)) == 4


def test_through_the_command_line(pair: Pair, run: Run) -> None:
    bundle = pair.fixed.directory
    answer = run("run", bundle, "-p", "Hi", "--raw", "--max-tokens", 5, "--threads", THREADS, "--json")
    assert answer.code == 0, answer.stderr
    plain = run("run", pair.any.directory, "-p", "Hi", "--raw", "--max-tokens", 5, "--threads", THREADS, "--json")
    assert answer.document == plain.document and len(answer.document["tokens"]) > 0
    again = run("validate", bundle, "--against", pair.checkpoint, "--threads", THREADS, "--json")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert again.code in (0, 2), again.stderr
    assert report["fidelity"]["overall"]["positions"] == pair.fixed.report.fidelity.overall.positions


def test_a_device_answers_as_this_machine_does(pair: Pair, tmp_path: Path, run: Run) -> None:
    """Its program has the same loop, which reads chunks too."""
    bundle = pair.fixed.directory
    asked = run("validate", bundle, "--against", pair.checkpoint, "--device", "local", "--threads", THREADS, "--json")
    assert asked.code in (0, 2), asked.stderr
    (device,) = asked.document["devices"]
    expected = pair.fixed.report.fidelity.overall
    assert device["fidelity"]["overall"]["positions"] == expected.positions
    assert device["fidelity"]["overall"]["kl_mean_nats"] == pytest.approx(expected.kl_mean_nats, rel=1e-3)
    job = tmp_path / "job"
    prompts = [PROMPT[:length] for length in (1, CHUNK, 40)]
    write_job(
        job,
        Bundle.open(bundle),
        [TextQuestion(torch.tensor(PROMPT[:20]), 1, torch.zeros(19, 1), None)],
        [PromptQuestion(ids, 12) for ids in prompts],
        vocabulary_size=264,
        speed=SpeedRequest(prompt=tuple(PROMPT[:20]), generated_tokens=3, rounds=1, seconds=0),
        threads=THREADS,
    )
    LocalRunner()(job, tmp_path / "results", Silent())
    session = GenerationSession.open(Bundle.open(bundle), THREADS)
    answers = DeviceAnswers.open("local", job, tmp_path / "results")
    assert [answers.tokens(index) for index in range(3)] == [session.tokens(ids, 12) for ids in prompts]
    assert answers.result.speed is not None and answers.result.nodes is not None
    assert sum(node.operator == "ScatterND" for node in answers.result.nodes) == 8
    with pytest.raises(InputError, match="which no browser needs"):
        check_limits(job, read_job(job))
    question = TextQuestion(torch.tensor([*PROMPT, 1]), 1, torch.zeros(CONTEXT, 1), None)
    with pytest.raises(InputError, match="97 tokens, and the caches of the bundle hold 96"):
        write_job(
            tmp_path / "long", Bundle.open(bundle), [question], [], vocabulary_size=264, speed=None, threads=1
        )
    assert not (tmp_path / "long").exists()


def test_what_graphs_of_fixed_shapes_do_not_do(pair: Pair, tmp_path: Path, run: Run) -> None:
    bundle, target = pair.fixed.directory, write_fixed_target(tmp_path, CHUNK, CONTEXT)
    for arguments in (
        ("run", bundle, "-p", "Hi", "--speculate", "lookup"),
        ("tune", pair.checkpoint, "--target", target, "-o", tmp_path / "tuned.toml"),
    ):
        refused = run(*arguments)
        assert refused.code == EXIT_INPUT and "fixed shapes" in refused.stderr, (arguments, refused.stderr)
    assert not (tmp_path / "tuned.toml").exists()
    with pytest.raises(InputError, match="logits of one position"):
        open_engine(Bundle.open(bundle), THREADS, speculation=open_speculation("mtp", None))
    with pytest.raises(InputError, match="97 tokens, and the caches of the bundle hold 96"):
        ScoringSession(Bundle.open(bundle), THREADS).logits(np.array([*PROMPT, 1]))


def test_a_bundle_that_is_broken(pair: Pair, tmp_path: Path) -> None:
    described = json.loads((pair.fixed.directory / "loop.json").read_text(encoding="utf-8"))
    (tmp_path / "loop.json").write_text(json.dumps({**described, "chunk": 0}), encoding="utf-8")
    with pytest.raises(BundleError, match="not what a loop reads"):
        GenerationSession.open(Bundle(tmp_path, read_manifest(pair.fixed.directory)), THREADS)
    shutil.copytree(pair.fixed.directory, tmp_path / "bundle")
    (tmp_path / "bundle" / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"cannot load .*step\.onnx"):
        GenerationSession.open(Bundle.open(tmp_path / "bundle"), THREADS)


def test_inspect_says_which_models_fit(pair: Pair, run: Run) -> None:
    document = run("inspect", pair.checkpoint, "--json").document
    (row,) = [row for row in document["estimates"] if row["target"] == "qnn"]
    assert row["refused"] is None and row["context_length"] == 256
    # Keys and values of both layers in fp16.
    assert row["cache_bytes_per_token"] == 2 * 2 * 2 * 32 * 2
