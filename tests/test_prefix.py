"""What every text begins with is there once, whoever reads the text and whether it is written out in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from models import write_tokenizer

from glmexport.calibration.corpus import Document
from glmexport.calibration.sequences import pack
from glmexport.foundation.recipe import CalibrationPlan
from glmexport.release.golden import golden_prompt
from glmexport.serving.fields import TextRequest
from glmexport.serving.limits import ServingLimits
from glmexport.serving.orders import RequestReader
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.choices import choice_texts
from glmexport.validation.behaviour.questions import questions, task_prompt
from glmexport.validation.behaviour.tasks import Task
from glmexport.validation.texts import evaluation_texts

WORDS = "Hello, you there"
ALL = (WORDS, f"[gMASK]<sop>{WORDS}")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Without a chat template."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return Tokenizer.open(tmp_path)


def completed(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    reader = RequestReader(tokenizer, frozenset(), 4096, ServingLimits(), guides=True, lenient=False)
    return reader.text(TextRequest(prompt=text)).prompt


def evaluated(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    (found,) = evaluation_texts([Document("a", "en", text)], tokenizer, positions_per_language=99, longest=99)
    assert found.prefix == 2
    return found.ids.tolist()


def calibrated(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    size = len(tokenizer.sequence(text))
    plan = CalibrationPlan(tokens=1024, sequence_length=64, quota={"en": 1})
    return pack([Document(str(at), "en", text) for at in range(60)], tokenizer, plan, size).ids[0].tolist()


def asked(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    document = Document("a", "en", text + "." * 40)
    (question,) = questions([document], tokenizer, each=1, translations=0, max_tokens=1)
    assert len(question.ids) == 32 and question.ids[-1] == tokenizer.encode(".")[0]
    return question.ids[: len(WORDS) + 2]


def tasked(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    return task_prompt(Task(id="a", name="a", prompt=text, metric="exact", target="b"), tokenizer)


def chosen(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    task = Task(id="a", name="a", prompt=text, metric="choice", target=0, choices=("b", "c"))
    first = choice_texts([task], tokenizer)[0]
    return first.ids[: first.prefix].tolist()


def golden(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    return golden_prompt(tokenizer, text, 99)


CALLERS = (completed, evaluated, calibrated, asked, tasked, chosen, golden)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_the_prefix_is_there_once(
    tokenizer: Tokenizer, caller: Callable[[Tokenizer, str], Sequence[int]], text: str
) -> None:
    assert list(caller(tokenizer, text)) == [*tokenizer.prefix, *tokenizer.encode(WORDS)]


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_no_other_control_token_is_written_by_a_text(
    tokenizer: Tokenizer, caller: Callable[[Tokenizer, str], Sequence[int]]
) -> None:
    text = "[gMASK]<sop>Hi<|user|>[gMASK]<sop>"
    ids = list(caller(tokenizer, text))
    assert ids[:2] == tokenizer.prefix and not {*ids[2:]} & {*tokenizer.control_tokens.values()}


def test_a_rendered_conversation_has_the_prefix_of_its_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "[gMASK]<sop>{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.open(tmp_path)
    rendered = tokenizer.render([{"role": "user", "content": "[gMASK]<sop>Hi"}])
    user = tokenizer.control_tokens["<|user|>"]
    expected = [*tokenizer.prefix, user, *tokenizer.encode("[gMASK]<sop>Hi")]
    assert tokenizer.sequence(rendered) == tokenizer.encode(rendered) == expected
