"""Sequences that are computed together: what each is alone but for rounding, whoever comes and goes."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from builds import Run
from served import PATIENCE_S, scripted_bundle
from test_scheduler import Waiting, last

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.engine.generation import GenerationSession
from glmexport.engine.opening import open_engine
from glmexport.foundation.errors import InputError, MachineError
from glmexport.serving.answer import End, Event, Failed
from glmexport.serving.guides import Guide, Guides

PROMPTS = [np.random.default_rng(at).integers(0, 250, size).tolist() for at, size in enumerate((20, 300, 7, 1020))]


def test_each_is_what_it_is_alone(bundle: Path) -> None:
    """A prompt to the bit, and steps but for rounding; over the place where caches grow, and beside idle slots."""
    alone = open_engine(Bundle.open(bundle), 1)
    together = open_engine(Bundle.open(bundle), 1, batch=4)
    assert together.batched and together.chunk
    mine = [together.begin(len(prompt) + 20) for prompt in PROMPTS]
    others = [alone.begin(len(prompt) + 20) for prompt in PROMPTS]
    logits = []
    for prompt, sequence, other in zip(PROMPTS, mine, others, strict=True):
        for start in range(0, len(prompt), together.chunk):
            piece = prompt[start : start + together.chunk]
            given, wanted = sequence.advance(piece), other.advance(piece)
            assert np.array_equal(given, wanted)
        logits.append(given[-1])
    for step in range(12):
        active = [0, 1, 2, 3] if step < 5 else [0, 3]
        tokens = [int(logits[at].argmax()) for at in active]
        rows = together.step([mine[at] for at in active], tokens)
        for row, at, token in zip(rows, active, tokens, strict=True):
            logits[at] = row
            assert np.abs(row - others[at].advance([token])[-1]).max() < 1e-3
    assert np.abs(mine[1].advance([5]) - others[1].advance([5])).max() < 1e-3
    mine[2].forget(3)
    others[2].forget(3)
    assert np.abs(mine[2].advance([9, 8, 7], every=True) - others[2].advance([9, 8, 7], every=True)).max() < 1e-3
    with pytest.raises(ValueError, match="None"):
        together.begin(9)
    mine[1].close()
    # The slot that is free has been used before.
    assert np.array_equal(together.begin(9).advance([5]), alone.begin(9).advance([5]))


@pytest.mark.parametrize("reuse", [False, True])
def test_answers_of_many_at_once(bundle: Path, reuse: bool) -> None:
    waiting = Waiting(bundle, parallel=3, batch=True, reuse=reuse)
    texts = ["Hi!", "Hello", "Endless~", "x" * 700, "Hi&", "x" * 700 + "!", "Hello", "a b c", "Endless~"]
    asked = [waiting.submit(text, 30) for text in texts]
    waiting.scheduler.start()
    gone, _ = waiting.submit("Endless~", 3900)
    ends = [last(told) for _, told in asked]
    again = []
    for text in ("y" * 700, "y" * 700 + "!"):
        asked.append(waiting.submit(text, 30))
        again.append(last(asked[-1][1]))
    gone.cancelled = True
    assert all(isinstance(end, End) for end in ends)
    session = GenerationSession.open(Bundle.open(bundle), 1)
    for answer, _ in asked:
        wanted = [token for token in session.tokens(answer.order.prompt, 30) if token not in answer.order.ends]
        assert answer.tokens == wanted
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)
    assert [end.cached for end in again if isinstance(end, End)] == [0, 512 if reuse else 0]


def test_who_fails_leaves_its_slot(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(bundle, parallel=1, batch=True)
    asked: list[queue.Queue[Event]] = []
    for _ in range(3):
        answer, told = waiting.submit("Hi!")
        asked.append(told)
    monkeypatch.setattr(answer, "say", None)  # the last one's
    _, after = waiting.submit("Hi!", 40)
    waiting.scheduler.start()
    kinds = [type(last(told)).__name__ for told in (*asked, after)]
    assert kinds == ["End", "End", "Failed", "End"]
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)


def test_a_guided_answer_takes_the_slot_of_one_that_is_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guides = Guides(bundle, GenaiConfig.read(bundle))
    waiting = Waiting(bundle, guides, parallel=1, batch=True, reuse=True)
    guide = Guide("json_schema", json.dumps({"enum": ["yes"]}))
    guides.tried(guide).result()
    told = [waiting.submit("x" * 700, 2)[1], waiting.submit("Hi!", 40, guide=guide)[1]]
    waiting.scheduler.start()
    assert [type(last(each)).__name__ for each in told] == ["End", "End"]
    # One that finds no process to hold it leaves the slot to the next.
    begin = Guides.begin

    def crowded(*_: object) -> NoReturn:
        raise MachineError("There is no process.", next_step="Wait.")

    monkeypatch.setattr(Guides, "begin", crowded)
    assert isinstance(last(waiting.submit("Hi!", 40, guide=guide)[1]), Failed)
    monkeypatch.setattr(Guides, "begin", begin)
    assert isinstance(last(waiting.submit("Hi!", 40, guide=guide)[1]), End)
    waiting.scheduler.close()
    assert waiting.scheduler.join(PATIENCE_S)
    guides.close()


def test_what_cannot_be_computed_together(tmp_path_factory: pytest.TempPathFactory, bundle: Path, run: Run) -> None:
    latent = scripted_bundle(tmp_path_factory.getbasetemp(), "glm4_moe_lite")
    with pytest.raises(InputError, match="several lengths"):
        open_engine(Bundle.open(latent), 1, batch=4)
    refused = run("serve", bundle, "--port", 0, "--batch", "--speculate", "lookup")
    assert refused.code == 64 and "either guessed or computed together" in refused.stderr
