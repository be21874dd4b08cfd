"""Guessed tokens change how fast an answer comes, and never the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import THREADS
from models import write_checkpoint
from predicting import PREDICTING, Predicting, enliven, write_unvalidated

from benchmarks.speculation import Scripted
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import read_loop
from glmexport.engine.core.drafting import Drafter, PromptLookup
from glmexport.engine.core.graph_engine import GROWTH
from glmexport.engine.genai import GenaiSequence
from glmexport.engine.generation import GenerationSession
from glmexport.engine.opening import open_engine
from glmexport.engine.speculation import Speculation, open_speculation, speculate
from glmexport.foundation.errors import BundleError, InputError

CONTEXT = 320
IDS = np.random.default_rng(0).integers(0, 250, CONTEXT).tolist()
SETTINGS: dict[str, Any] = {"max_position_embeddings": CONTEXT, "eos_token_id": [256]}
#: Of the prompt and of the answer: short ones, past the growth of caches, to the end of the context, and beyond.
LENGTHS = [(1, 24), (9, 60), (GROWTH - 4, 40), (CONTEXT - 3, 40), (CONTEXT - 1, 40), (30, 1), (30, 2)]


@pytest.fixture(scope="module", params=["glm", "glm4", *PREDICTING])
def bundle(request, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    if request.param in PREDICTING:
        family, changes = PREDICTING[request.param]
        Predicting(base / "checkpoint", family, **changes, **SETTINGS)
    else:
        write_checkpoint(base / "checkpoint", request.param, num_hidden_layers=2, **SETTINGS)
    enliven(base / "checkpoint")
    return write_unvalidated(base / "checkpoint", base / "bundle")


@pytest.fixture(scope="module")
def plain(bundle: Path) -> GenerationSession:
    return GenerationSession.open(Bundle.open(bundle), THREADS)


def speculations(bundle: Path) -> Iterator[Speculation]:
    yield from (Speculation("lookup", 1), Speculation("lookup", 8))
    if read_loop(bundle):
        yield from (Speculation("mtp", 1), Speculation("mtp", 5))


def test_the_same_tokens_by_every_way_to_guess(bundle: Path, plain: GenerationSession) -> None:
    answers = [plain.tokens(IDS[:length], count) for length, count in LENGTHS]
    assert len({token for answer in answers for token in answer}) > 9
    assert [len(answer) for answer in answers[3:]] == [3, 1, 1, 2]
    for speculation in speculations(bundle):
        session = GenerationSession.open(Bundle.open(bundle), THREADS, speculation)
        assert [session.tokens(IDS[:length], count) for length, count in LENGTHS] == answers, speculation
        tally = speculation.tally
        assert 0 <= tally.accepted <= tally.drafted and tally.drafted > 0
        # Every token but the first of an answer comes with a step, or was accepted.
        assert tally.steps + tally.accepted >= sum(map(len, answers)) - len(answers)


@pytest.mark.parametrize("length", [7, GROWTH - 4])
def test_guesses_that_are_right_wrong_or_partly_right(bundle: Path, plain: GenerationSession, length: int) -> None:
    prompt, count = IDS[:length], 40
    answer = plain.tokens(prompt, count)
    wrong = [(token + 1) % 250 for token in answer]
    partly = [token if at % 3 else other for at, (token, other) in enumerate(zip(answer, wrong, strict=True))]

    def given(guesses: Sequence[int], tokens: int = 4) -> Speculation:
        speculation = Speculation("lookup", tokens)
        drafter: Drafter = Scripted(length, guesses)
        sequence = plain.engine.begin(length + count)
        assert list(speculate(sequence, drafter, prompt, count, speculation, plain.engine.chunk)) == answer
        return speculation

    right = given(answer).tally
    assert right.accepted == right.drafted == 31 and right.steps == 8  # 39 tokens behind the first, five a step
    assert given(answer, 15).tally.steps == 3
    assert (given(wrong).tally.accepted, given(wrong).tally.steps) == (0, 39)
    assert 0 < given(partly).tally.accepted < given(partly).tally.drafted


def test_an_end_inside_of_an_accepted_run_ends_the_answer(bundle: Path, plain: GenerationSession) -> None:
    prompt = IDS[:9]
    answer = plain.tokens(prompt, 40)
    end = answer[20]
    expected = answer[: answer.index(end) + 1]
    for speculation in speculations(bundle):
        session = GenerationSession.open(Bundle.open(bundle), THREADS, speculation)
        session.ends = frozenset({end})
        assert session.tokens(prompt, 40) == expected
        # And the next answer begins anew.
        assert session.tokens(prompt, 40) == expected


def test_a_batch_is_not_guessed(bundle: Path, plain: GenerationSession) -> None:
    prompts = [IDS[:9], IDS[40:49]]
    speculation = Speculation("lookup", 4)
    session = GenerationSession.open(Bundle.open(bundle), THREADS, speculation)
    assert session.together(prompts, [12, 12]) == plain.together(prompts, [12, 12])
    assert speculation.tally.steps == 0


def test_what_a_bundle_cannot_verify_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="15 tokens at a time, and 16"):
        GenerationSession.open(Bundle.open(bundle), THREADS, Speculation("lookup", 16))
    if not read_loop(bundle):
        with pytest.raises(InputError, match="onnxruntime-genai"):
            GenerationSession.open(Bundle.open(bundle), THREADS, Speculation("mtp", 1))


def test_a_prompt_that_fills_the_context_is_refused(bundle: Path) -> None:
    session = GenerationSession.open(Bundle.open(bundle), THREADS, Speculation("lookup", 4))
    with pytest.raises(InputError, match="320 tokens and the context 320"):
        session.tokens(IDS, 1)


def test_drafts_by_the_layer_are_those_of_its_formula(tmp_path: Path) -> None:
    """Position by position, through chunks of the prompt, growing caches, and guesses that are taken back."""
    predicting = Predicting(tmp_path / "checkpoint", "glm4_moe_lite", **SETTINGS)
    path = write_unvalidated(tmp_path / "checkpoint", tmp_path / "bundle")
    speculation = Speculation("mtp", 2)
    engine = open_engine(Bundle.open(path), THREADS, speculation=speculation)
    proposed: list[tuple[list[int], list[int]]] = []

    class Watched:
        def __init__(self) -> None:
            self.inner, self.tokens = engine.drafter(), list[int]()

        def follow(self, ids: Sequence[int], hidden: Any) -> None:
            self.tokens += ids
            self.inner.follow(ids, hidden)

        def propose(self, following: int, count: int) -> list[int]:
            drafts = self.inner.propose(following, count)
            proposed.append(([*self.tokens, following], drafts))
            return drafts

    prompt = IDS[: GROWTH + 3]
    answer = list(speculate(engine.begin(len(prompt) + 8), Watched(), prompt, 8, speculation, engine.chunk))
    assert len(answer) == 8 and len(proposed) >= 3
    for tokens, drafts in proposed:
        ids = torch.tensor([tokens])
        hidden = predicting.hidden(ids)[:, :-1]
        logits, states = predicting(ids[:, 1:], hidden)
        first = logits[:, -1].argmax(-1)
        assert drafts[0] == int(first)
        if len(drafts) > 1:
            pairs = torch.cat([ids[:, 1:], first[:, None]], 1), torch.cat([hidden, states[:, -1:]], 1)
            assert drafts[1] == int(predicting(*pairs)[0][0, -1].argmax())


def test_a_bundle_without_a_draft_graph_or_of_an_older_version(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "glm4_moe_lite", num_hidden_layers=2, **SETTINGS)
    path = write_unvalidated(tmp_path / "checkpoint", tmp_path / "bundle")
    with pytest.raises(InputError, match="no draft graph"):
        GenerationSession.open(Bundle.open(path), THREADS, Speculation("mtp", 1))
    config = read_loop(path)
    assert config is not None
    older = config.model_copy(update={"short_step": 1})
    (path / "loop.json").write_text(older.model_dump_json(exclude_defaults=True))
    with pytest.raises(InputError, match="verifies 0 tokens"):
        GenerationSession.open(Bundle.open(path), THREADS, Speculation("lookup", 1))


def test_lookup_guesses_what_followed_the_last_time() -> None:
    lookup = PromptLookup()
    lookup.follow([1, 2, 3, 4, 5, 1, 2], None)
    assert lookup.propose(3, 3) == [4, 5, 1]
    lookup.follow([3, 9], None)
    # The latest occurrence counts, and the longest that is found.
    assert lookup.propose(2, 2) == []
    lookup.follow([1, 2], None)
    assert lookup.propose(3, 1) == [9]
    repeated = PromptLookup()
    repeated.follow([7, 7], None)
    assert repeated.propose(7, 5) == [7] * 5
    assert PromptLookup().propose(1, 4) == []


def test_how_many_tokens_are_guessed() -> None:
    assert open_speculation("none", None) is None
    lookup, mtp = open_speculation("lookup", None), open_speculation("mtp", 3)
    assert lookup is not None and mtp is not None and (lookup.tokens, mtp.tokens) == (8, 3)
    with pytest.raises(InputError, match="nothing is guessed"):
        open_speculation("none", 2)


def test_a_graph_without_the_logits_of_every_position(bundle: Path) -> None:
    """As bundles of before have them."""
    if read_loop(bundle):
        return
    class Older:
        def append_tokens(self, ids: Any) -> None: ...

        def get_output(self, name: str) -> Any:
            raise RuntimeError(f"no output {name}")

    with pytest.raises(BundleError, match="no recent_logits"):
        GenaiSequence(Older(), 9, None).advance([1], every=True)
