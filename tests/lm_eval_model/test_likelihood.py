"""Likelihoods of continuations: against a softmax written out, of a bundle and of a checkpoint alike."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import THREADS, build, small_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import glmexport.lm_eval.likelihood
import glmexport.workflows.build
from glmexport.bundle.bundle import Bundle
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Silent
from glmexport.lm_eval.likelihood import (
    Likelihood,
    Request,
    bundle_likelihoods,
    checkpoint_likelihoods,
    fitted,
    windows,
)
from glmexport.reference.reference import Reference
from glmexport.workflows.original import Original

PREFIX = [262, 263]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, and ``bundle`` in full precision."""
    return tmp_path_factory.mktemp("likelihood")


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    return small_checkpoint(place / "checkpoint")


@pytest.fixture(scope="module")
def session(model: Any, place: Path) -> ScoringSession:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
        build(place / "checkpoint", place / "bundle", "fp32")
    return ScoringSession(Bundle.open(place / "bundle"), THREADS)


@pytest.fixture(scope="module")
def reference(model: Any, place: Path) -> Reference:
    original = Original.open(str(place / "checkpoint"), Silent())
    return Reference(original.checkpoint, original.architecture)


def naive(model: Any, request: Request) -> Likelihood:
    """Token by token: one pass of transformers' whole model for each, and the softmax by its formula."""
    total, greedy = 0.0, True
    for place, token in enumerate(request.continuation):
        ids = [*request.context, *request.continuation[:place]]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].double().tolist()
        largest = max(logits)
        total += logits[token] - largest - math.log(math.fsum(math.exp(value - largest) for value in logits))
        greedy &= logits[token] == largest
    return Likelihood(total, greedy)


def requests_of(model: Any) -> list[Request]:
    """Of several lengths, some with the same inputs, one twice, one empty, and one that greedy decoding gives."""
    wheel = random.Random(1)
    found = [
        Request((*PREFIX, *wheel.choices(range(256), k=before)), tuple(wheel.choices(range(256), k=after)))
        for before, after in [(3, 1), (9, 4), (0, 6), (20, 2), (5, 1)]
    ]
    context, ids = found[1].context, list(found[1].context)
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    choices = [Request(found[0].context, (token,)) for token in (7, 8)]
    return [*found, Request(context, tuple(ids[len(context) :])), *choices, found[1], Request(context, ())]


def close(found: Sequence[Likelihood], expected: Sequence[Likelihood]) -> None:
    assert [each.log_p for each in found] == pytest.approx([each.log_p for each in expected], abs=1e-3)
    assert [each.greedy for each in found] == [each.greedy for each in expected]


def test_bundle_and_checkpoint_are_as_the_softmax_written_out(
    model: Any, session: ScoringSession, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(model)
    expected = [naive(model, request) for request in requests]
    assert expected[5].greedy and not all(each.greedy for each in expected) and expected[-1] == (0, True)
    close(bundle_likelihoods(session, requests, Silent()), expected)
    close(checkpoint_likelihoods(reference, requests, tmp_path, Silent()), expected)
    # In parts that are smaller than a text, and rows of several texts in pieces.
    monkeypatch.setattr(glmexport.lm_eval.likelihood, "TOKENS", 20)
    monkeypatch.setattr(glmexport.lm_eval.likelihood, "_ROWS", 3)
    close(checkpoint_likelihoods(reference, requests, tmp_path, Silent()), expected)
    assert not list(tmp_path.iterdir())


def test_what_is_read_in_common_is_read_once(model: Any, session: ScoringSession) -> None:
    passes = []

    class Counted:
        def logits(self, ids: np.ndarray) -> np.ndarray:
            passes.append(len(ids))
            return session.logits(ids)

    choices = [Request((*PREFIX, 5, 6), (token,)) for token in range(10)]
    bundle_likelihoods(Counted(), choices, Silent())  # type: ignore[arg-type]
    assert passes == [4]


def test_no_requests(session: ScoringSession, reference: Reference, tmp_path: Path) -> None:
    assert bundle_likelihoods(session, [], Silent()) == []
    assert checkpoint_likelihoods(reference, [], tmp_path, Silent()) == []


def test_contexts_are_cut_from_the_left_behind_the_prefix() -> None:
    request = Request((1, 2, 10, 11, 12), (20, 21))
    assert fitted(request, [1, 2], 6) is request
    assert fitted(request, [1, 2], 5) == Request((1, 2, 11, 12), (20, 21))
    assert fitted(request, [1, 2], 3) == Request((1, 2), (20, 21))
    # The first is not the prefix.
    assert fitted(request, [9], 4) == Request((10, 11, 12), (20, 21))
    assert fitted(request, [], 2) == Request((12,), (20, 21))
    for prefix, window in (([1, 2], 2), ([], 1)):
        with pytest.raises(InputError, match=f"has 2 tokens and the context {window}"):
            fitted(request, prefix, window)


@given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 12))
def test_every_token_of_a_text_is_predicted_once(length: int, prefix: int, room: int) -> None:
    tokens, start = list(range(100, 100 + length)), list(range(prefix))
    found = list(windows(tokens, start, prefix + room))
    assert [token for request in found for token in request.continuation] == tokens
    for number, request in enumerate(found):
        assert len(request.inputs) <= prefix + room
        assert list(request.context[:prefix]) == start
        # What precedes them in the text, and as much of it as there is room for in the last one.
        text = request.context[prefix:] + request.continuation
        assert list(text) == list(range(text[0], text[0] + len(text)))
        assert (len(request.context) > prefix) == (number > 0)
        assert number == 0 or len(request.inputs) == prefix + room


def test_windows_by_hand() -> None:
    """Ten tokens and one that begins every text, four of which can be read at a time."""
    assert list(windows(range(10), [77], 4)) == [
        Request((77,), (0, 1, 2, 3)),
        Request((77, 3), (4, 5, 6)),
        Request((77, 6), (7, 8, 9)),
    ]
    # The last one has more context.
    assert list(windows(range(8), [77], 4))[2] == Request((77, 4, 5, 6), (7,))
    with pytest.raises(InputError, match="2 begin every text"):
        list(windows([5], [1, 2], 2))
