"""Batches that pass each block together give what each gives alone, and a validation reads a checkpoint twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builds import QUICK, THREADS, TURNS, Sample, no_turns
from models import TINY, write_checkpoint

from glmexport.architecture.description import DecoderLayer
from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Silent
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference
from glmexport.validation.fidelity import Streamed, compare, statistics_of
from glmexport.validation.looks import first_texts
from glmexport.validation.noise import TextBatch, repeated_states, text_batches
from glmexport.validation.reference import reference_states
from glmexport.validation.routing import Routes
from glmexport.validation.shares import bundle_answer
from glmexport.validation.texts import EvaluationSet, EvaluationText
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, validate_bundle

SAMPLE = [0, 3, 4]


def reference_of(checkpoint: Path) -> Reference:
    original = Original.open(str(checkpoint), Silent())
    return Reference(original.checkpoint, original.architecture)


def texts_of(*lengths: int) -> list[EvaluationText]:
    generator = torch.Generator().manual_seed(0)
    return [EvaluationText(str(n), "en", torch.randint(0, 250, (n,), generator=generator), 1) for n in lengths]


def batches_of(texts: list[EvaluationText], reference: Reference) -> list[TextBatch]:
    return text_batches(texts, SAMPLE, routed=bool(reference.architecture.routed))


@pytest.mark.parametrize("family", ["glm4", "glm4_moe", "glm_moe_dsa"])
def test_runs_together_are_those_alone(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, **TINY[family])
    reference, texts = reference_of(tmp_path / "checkpoint"), texts_of(20, 31, 7, 24, 9)
    batches = batches_of(texts, reference)
    runs = repeated_states(reference, texts, batches, 2, tmp_path, Silent())
    together, alone = runs.routes, Routes()
    for batch in batches:
        chosen = [texts[place] for place in batch.places]
        once = reference_states(reference, chosen, tmp_path, Silent())
        assert all(torch.equal(runs.states.load(index), once.load(place)) for place, index in enumerate(batch.places))
        if batch.again:
            again = reference_states(reference, chosen, tmp_path, Silent(), batch=4, routes=alone)
            places = [SAMPLE.index(index) for index in batch.places]
            assert all(torch.equal(runs.sample.load(p), once.load(place)) for place, p in enumerate(places))
            assert all(torch.equal(runs.again.load(p), again.load(place)) for place, p in enumerate(places))
    assert together.layers.keys() == alone.layers.keys()
    assert all(torch.equal(rows, alone.layers[layer]) for layer, rows in together.layers.items())


def test_both_runs_go_on_where_they_were_killed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "glm4", num_hidden_layers=3)
    reference, texts = reference_of(tmp_path / "checkpoint"), texts_of(20, 31, 7, 24, 9)
    expected = repeated_states(reference, texts, batches_of(texts, reference), 2, tmp_path, Silent())
    kept, fill = WorkDirectory(tmp_path / "work", {}), reference.block
    blocks: list[int] = []

    def killed_at(last: int) -> None:
        def block(layer: DecoderLayer) -> Block:
            if layer.index == last:
                raise KeyboardInterrupt
            blocks.append(layer.index)
            return fill(layer)

        with patch.object(reference, "block", block):
            runs = repeated_states(reference, texts, batches_of(texts, reference), 2, tmp_path, Silent(), kept=kept)
        assert all(torch.equal(runs.states.load(index), expected.states.load(index)) for index in range(len(texts)))
        assert all(torch.equal(runs.again.load(place), expected.again.load(place)) for place in range(len(SAMPLE)))

    with pytest.raises(KeyboardInterrupt):
        killed_at(2)
    killed_at(99)
    assert blocks == [0, 1, 2]


def test_a_validation_reads_blocks_twice_and_figures_are_those_of_separate_runs(sample: Sample, tmp_path: Path) -> None:
    """Once for the original and once for the bundle's weights; and the graph runs every text once."""
    original = Original.open(str(sample.checkpoint), Silent())
    bundle = Bundle.open(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    blocks: list[int] = []
    scored: list[int] = []
    fill, score = Reference.block, ScoringSession.logits

    def block(self: Reference, layer: DecoderLayer, *given: Any, **named: Any) -> Block:
        blocks.append(layer.index)
        return fill(self, layer, *given, **named)

    def logits(self: ScoringSession, ids: Any) -> Any:
        scored.append(len(ids))
        return score(self, ids)

    plan = replace(QUICK, share_texts=1)
    with (
        patch(TURNS, no_turns),
        patch.object(Reference, "block", block),
        patch.object(ScoringSession, "logits", logits),
    ):
        report = validate_bundle(bundle, original, BuildOptions(THREADS, validation=plan), Silent()).report
    assert blocks == [0, 1, 0, 1]

    reference, progress = Reference(original.checkpoint, original.architecture), Silent()
    evaluation = EvaluationSet(evaluation_documents((), original.tokenizer), original.tokenizer)
    texts = evaluation.texts(original.architecture.context_length, plan)
    assert scored == [len(text.ids) for text in texts]
    chosen = [texts[index] for index in first_texts(texts, 1)]
    torch.set_num_threads(THREADS)
    states = Streamed(reference_states(reference, chosen, tmp_path, progress), reference)

    torch.set_num_threads(2)
    again = reference_states(reference, chosen, tmp_path, progress, batch=4)
    torch.set_num_threads(THREADS)
    noise = compare(states, lambda index: reference.logits(again.states(index)), progress, "")
    assert report.fidelity.noise_floor == statistics_of("all", noise)

    weights = BundleWeights.open(bundle, original.architecture)
    folded = Reference(original.checkpoint.folded(bundle_folds(sample.bundle)), original.architecture)
    table = weights.quantized(original.architecture.embedding)
    head = weights.quantized(original.architecture.lm_head.weight)
    assert table is not None and head is not None
    linears = reference_states(folded.exchanged(weights.dequantized), chosen, tmp_path, progress)
    whole = reference_states(folded.exchanged(weights.dequantized, table.lookup), chosen, tmp_path, progress)
    session = ScoringSession(bundle, THREADS)

    def mean(answers: Any) -> float:
        return float(torch.cat([each.kl for each in compare(states, answers, progress, "")]).double().mean())

    means = [
        mean(lambda index: reference.logits(linears.states(index))),
        mean(lambda index: head.apply(whole.states(index))),
        mean(partial(bundle_answer, session, chosen)),
    ]
    assert [share.kl_mean_nats for share in report.shares] == pytest.approx(
        [means[0], means[1] - means[0], means[2] - means[1]], rel=1e-9, abs=1e-12
    )
