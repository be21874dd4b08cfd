"""The original, one block at a time, is transformers' whole model; and the texts that it is asked about."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from builds import THREADS, Sample, session, small_checkpoint
from models import write_checkpoint

from glmexport.architecture.description import DecoderLayer
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.calibration.corpus import Document, shipped_documents
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import BundleError, MachineError
from glmexport.foundation.progress import Silent
from glmexport.quantization.store import WorkDirectory
from glmexport.reference.reference import Block, Reference
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.divergence import Divergence, divergence
from glmexport.validation.fidelity import Streamed, compare
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import EvaluationText, evaluation_texts
from glmexport.workflows.original import Original

TOLERANCE = 1e-5


@pytest.fixture
def tokenizer(sample: Sample) -> Tokenizer:
    return Tokenizer.open(sample.checkpoint)


def texts_of(tokenizer: Tokenizer) -> list[EvaluationText]:
    """Two of one length, for which the positions are shared, and a shorter one."""
    contents = [("en", "An original is asked once."), ("zh", "你好，世界。"), ("en", "Each block is read once only.")]
    documents = [Document(str(number), language, content) for number, (language, content) in enumerate(contents)]
    return evaluation_texts(documents, tokenizer, positions_per_language=100, longest=20)


def check(checkpoint: Path, model: torch.nn.Module, scratch: Path) -> None:
    original = Original.open(str(checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    texts = texts_of(original.tokenizer)
    states = reference_states(reference, texts, scratch, Silent())
    for index, text in enumerate(texts):
        with torch.inference_mode():
            whole = model.model(text.ids[None]).last_hidden_state[0]
            logits = model(text.ids[None]).logits[0]
        rows = slice(text.prefix - 1, len(text.ids) - 1)
        assert states.states(index).shape == (text.positions, 128)
        assert float((states.states(index) - whole[rows]).abs().max()) <= TOLERANCE
        assert float((reference.logits(states.states(index)) - logits[rows]).abs().max()) <= TOLERANCE


def test_states_and_logits_of_glm4(sample: Sample, tmp_path: Path) -> None:
    check(sample.checkpoint, sample.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_layer_selects_goes_on_to_those_that_share_it(tmp_path: Path) -> None:
    """Texts longer and shorter than what a token attends to, one and several at a time, and after a kill."""
    types = ["full", "shared", "full", "shared", "shared"]
    sizes = {"index_topk": 8, "index_n_heads": 32, "index_head_dim": 24, "num_hidden_layers": 5}
    model = write_checkpoint(tmp_path / "checkpoint", "glm_moe_dsa", indexer_types=types, **sizes)
    original = Original.open(str(tmp_path / "checkpoint"), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    generator = torch.Generator().manual_seed(0)
    texts = [
        EvaluationText(str(length), "en", torch.randint(0, 250, (length,), generator=generator), 1)
        for length in (30, 24, 6, 8, 21)
    ]
    whole = [model.model(text.ids[None]).last_hidden_state for text in texts]
    for batch in (1, 2, 5):
        states = reference_states(reference, texts, tmp_path, Silent(), batch=batch)
        assert all(float((states.load(i) - expected).abs().max()) < TOLERANCE for i, expected in enumerate(whole))

    kept = WorkDirectory(tmp_path / "work", {})
    blocks: list[int] = []
    fill = reference.block

    def killed_at(last: int) -> None:
        def block(layer: DecoderLayer, *arguments: Any, **named: Any) -> Block:
            if layer.index == last:
                raise KeyboardInterrupt
            blocks.append(layer.index)
            return fill(layer, *arguments, **named)

        with patch.object(reference, "block", block):
            states = reference_states(reference, texts, tmp_path, Silent(), kept=kept)
        assert all(float((states.load(i) - expected).abs().max()) < TOLERANCE for i, expected in enumerate(whole))

    for last in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            killed_at(last)
    killed_at(99)
    # From the block that selects: what is behind it is not enough to go on from.
    assert blocks == [0, 0, 1, 2, 3, 2, 3, 4]


def test_padding_and_choosing_change_nothing(sample: Sample, tokenizer: Tokenizer, tmp_path: Path) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    texts = [*texts_of(tokenizer), *evaluation_texts(
        [Document("long", "en", "A longer text than all the others here.")], tokenizer, positions_per_language=100,
        longest=60,
    )]  # fmt: skip
    assert len({len(text.ids) for text in texts}) > 1
    states = reference_states(reference, texts, tmp_path, Silent())
    for batch in (2, 3, 9):
        again = reference_states(reference, texts, tmp_path, Silent(), batch=batch)
        for index in range(len(texts)):
            torch.testing.assert_close(again.states(index), states.states(index), rtol=0, atol=TOLERANCE)
    expected = [states.states(3), states.states(1)]
    chosen = states.only([3, 1])
    del states
    gc.collect()
    assert [text.document for text in chosen.texts] == ["long", "1"]
    assert all(torch.equal(chosen.states(index), expected[index]) for index in range(2))


def test_the_lm_head_is_read_once_a_text_and_few_positions_are_compared_at_a_time(
    sample: Sample, tmp_path: Path
) -> None:
    """A large vocabulary takes a second to read, and a distribution over it in fp64 more than a megabyte."""
    original = Original.open(str(sample.checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    generator = torch.Generator().manual_seed(0)
    length = 47
    text = EvaluationText("any", "en", torch.randint(0, 250, (length,), generator=generator), 1)
    streamed = Streamed(reference_states(reference, [text], tmp_path, Silent()), reference)
    given = torch.randn(text.positions, reference.architecture.vocabulary_size, generator=generator)
    expected = divergence(reference.logits(streamed.states.states(0)), given, text.targets)
    asked: list[int] = []
    compared: list[int] = []
    logits = reference.logits

    def counted_logits(states: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        return logits(states)

    def counted(before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor) -> Divergence:
        compared.append(len(before))
        assert before.shape == after.shape
        return divergence(before, after, targets)

    with (
        patch.object(reference, "logits", counted_logits),
        patch("glmexport.validation.fidelity.divergence", counted),
    ):
        found = streamed.divergence(0, given)
    assert asked == [length - 1] and compared == [16, 16, 14]
    for name, value in vars(expected).items():
        torch.testing.assert_close(vars(found)[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_states_and_logits_of_glm(tied: bool, tmp_path: Path) -> None:
    model = small_checkpoint(tmp_path / "checkpoint", "glm", tie_word_embeddings=tied)
    check(tmp_path / "checkpoint", model, tmp_path)


def test_weights_in_place_of_the_original_s(sample: Sample, tmp_path: Path) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    texts = texts_of(original.tokenizer)
    key = "model.layers.1.mlp.down_proj.weight"
    asked = []

    def substitute(name: str) -> torch.Tensor | None:
        asked.append(name)
        return torch.zeros(original.checkpoint.shape(name)) if name == key else None

    embedded = reference.embed(torch.cat([text.ids for text in texts]))
    given = reference.exchanged(substitute, lambda _: embedded * 2)
    states = reference_states(given, texts, tmp_path, Silent())
    assert key in asked
    with torch.inference_mode():
        changed = copy.deepcopy(sample.model)
        changed.model.layers[1].mlp.down_proj.weight.zero_()
        changed.model.embed_tokens.weight.mul_(2)
        expected = changed.model(texts[0].ids[None]).last_hidden_state[0]
    rows = slice(texts[0].prefix - 1, len(texts[0].ids) - 1)
    assert float((states.states(0) - expected[rows]).abs().max()) <= TOLERANCE


def test_the_same_answers_do_not_diverge(sample: Sample, tmp_path: Path) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    reference = Reference(original.checkpoint, original.architecture)
    # Longer than the slab of positions that is compared at a time.
    documents = [Document("1", "en", "A long text. " * 30)]
    texts = evaluation_texts(documents, original.tokenizer, positions_per_language=1000, longest=250)
    states = reference_states(reference, texts, tmp_path, Silent())
    original = Streamed(states, reference)
    (same,) = compare(original, lambda index: reference.logits(states.states(index)), Silent(), "")
    assert len(same.kl) == 248 and float(same.kl.max()) == 0
    assert torch.equal(same.top_original, same.top_bundle)
    (other,) = compare(original, lambda index: reference.logits(states.states(index)).flip(-1), Silent(), "")
    assert float(other.kl.min()) > 0


# The bundle


def test_the_scoring_session_is_the_graph(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    ids = torch.arange(3, 40)
    logits = ScoringSession(Bundle(sample.bundle, manifest), THREADS).logits(ids.numpy())
    assert logits.shape == (37, sample.model.config.vocab_size)
    runtime = session(sample.bundle, "scoring.onnx")
    feeds = {"input_ids": ids[None].numpy(), "attention_mask": torch.ones(1, 37, dtype=torch.int64).numpy()}
    for value in runtime.get_inputs()[2:]:
        feeds[value.name] = torch.zeros(1, value.shape[1], 0, value.shape[3]).numpy()
    assert np.array_equal(logits, runtime.run(["logits"], feeds)[0][0])


def test_a_provider_that_is_not_here(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    provider = manifest.target.provider.model_copy(update={"name": "AbacusExecutionProvider"})
    elsewhere = manifest.model_copy(update={"target": manifest.target.model_copy(update={"provider": provider})})
    with pytest.raises(MachineError, match=r"AbacusExecutionProvider.*CPUExecutionProvider"):
        ScoringSession(Bundle(sample.bundle, elsewhere), THREADS)


def test_a_graph_that_is_none(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "scoring.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"scoring\.onnx"):
        ScoringSession(Bundle(tmp_path, read_manifest(sample.bundle)), THREADS)


# Texts


def test_positions_are_capped_by_language_and_by_text(tokenizer: Tokenizer) -> None:
    documents = [Document(str(number), language, "x" * 30) for number in range(4) for language in ("en", "zh")]
    texts = evaluation_texts(documents, tokenizer, positions_per_language=50, longest=22)
    for language in ("en", "zh"):
        mine = [text for text in texts if text.language == language]
        assert [text.positions for text in mine] == [20, 20, 10]
        assert [text.document for text in mine] == ["0", "1", "2"]
    for text in texts:
        assert len(text.ids) <= 22
        assert text.ids[: text.prefix].tolist() == tokenizer.prefix
        assert len(text.targets) == text.positions
        assert tokenizer.decode(text.targets.tolist()) == "x" * text.positions


def test_empty_documents_are_no_texts(tokenizer: Tokenizer) -> None:
    documents = [Document("1", "en", ""), Document("2", "en", "ab")]
    (text,) = evaluation_texts(documents, tokenizer, positions_per_language=9, longest=9)
    assert (text.document, text.positions) == ("2", 2)
    assert evaluation_texts([], tokenizer, positions_per_language=9, longest=9) == []


def test_every_shipped_language_can_be_judged(tokenizer: Tokenizer) -> None:
    texts = evaluation_texts(
        shipped_documents("evaluation"), tokenizer, positions_per_language=2048, longest=512
    )
    positions: dict[str, int] = {}
    for text in texts:
        positions[text.language] = positions.get(text.language, 0) + text.positions
    assert len(positions) == 21
    assert min(positions.values()) >= 500
