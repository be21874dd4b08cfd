"""Tasks of the user's: every kind of bad line is named, and answers are scored as by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sacrebleu import sentence_chrf

from glmexport.foundation.errors import InputError
from glmexport.validation.behaviour.tasks import Task, chrf, exact, read_tasks, score, score_choice

GOOD: dict[str, Any] = {"prompt": "2 + 2 =", "metric": "exact", "target": "4"}
CHOICE: dict[str, Any] = {"prompt": "Sky:", "metric": "choice", "choices": ["blue", "green"], "target": "blue"}


def write(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def task(**fields: Any) -> Task:
    return Task.model_validate({"id": "t", "name": "n", "prompt": "p", **fields})


def test_good_files(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi\u2028there"}]
    chat = {"id": "chat", "messages": messages, "metric": "regex", "target": "^h", "language": "en", "max_tokens": 9}
    # A line separator that is no end of a line in JSON.
    first = write(tmp_path / "one.jsonl", GOOD, "", json.dumps(chat, ensure_ascii=False))
    second = write(tmp_path / "two.jsonl", CHOICE, {**CHOICE, "name": "own", "target": 1, "id": "c"}, "  ")
    tasks = read_tasks([first, second])
    assert [(t.id, t.name) for t in tasks] == [
        ("one.jsonl:1", "one"), ("chat", "one"), ("two.jsonl:1", "two"), ("c", "own")
    ]  # fmt: skip
    assert tasks[0].targets == ("4",) and tasks[1].messages and tasks[1].messages[0].content == "Hi\u2028there"
    assert [t.answer for t in tasks[2:]] == [0, 1]


def test_the_examples_of_the_readme(tmp_path: Path) -> None:
    readme = Path(__file__).parents[3] / "README.md"
    section = readme.read_text(encoding="utf-8").split("## Your own tasks")[1]
    tasks = read_tasks([write(tmp_path / "tasks.jsonl", section.split("```")[1].strip())])
    assert {task.metric for task in tasks} == {"exact", "choice", "regex", "chrf"}
    assert score(tasks[0], " Tokyo, of course") == 1 and score(tasks[0], " Kyoto") == 0
    assert tasks[3].id == "fr-7"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "nests deeper"),
        ("[1]", "not an object"),
        ("3", "not an object"),
        ({"metric": "exact", "target": "4"}, "give either prompt or messages"),
        ({**GOOD, "messages": [{"role": "user", "content": "x"}]}, "give either prompt or messages"),
        ({**GOOD, "prompt": ""}, "prompt: "),
        ({**GOOD, "prompt": 3}, "prompt: "),
        ({**GOOD, "metric": "bleu"}, "metric: "),
        ({**GOOD, "target": []}, "target: "),
        ({**GOOD, "target": 4}, "target is a text"),
        ({**GOOD, "target": 4.5}, "target: "),
        ({**GOOD, "target": None}, "target: "),
        ({**GOOD, "target": True}, "target: "),
        ({"prompt": "x", "metric": "exact"}, "target: "),
        ({**GOOD, "tagret": "4"}, "tagret: "),
        ({**GOOD, "max_tokens": 0}, "max_tokens: "),
        ({**GOOD, "max_tokens": "9"}, "max_tokens: "),
        ({**GOOD, "id": ""}, "id: "),
        ({**GOOD, "id": None}, "id: "),
        ({**GOOD, "choices": ["a", "b"]}, "choices are for the metric choice"),
        ({**GOOD, "messages": [], "prompt": None}, "messages: "),
        ({**CHOICE, "choices": None}, "it needs them"),
        ({**CHOICE, "choices": ["blue"]}, "choices: "),
        ({**CHOICE, "choices": ["blue", ""]}, "choices: "),
        ({**CHOICE, "choices": ["blue", "blue"]}, "there twice"),
        ({**CHOICE, "target": "red"}, "'red' is none of the choices"),
        ({**CHOICE, "target": 2}, "2 is none of the choices"),
        ({**CHOICE, "target": -1}, "-1 is none of the choices"),
        ({**CHOICE, "target": ["blue"]}, "none of the choices"),
        ({**GOOD, "metric": "regex", "target": "("}, "no regular expression"),
        ({**GOOD, "metric": "regex", "target": ["a", "b"]}, "target is one pattern"),
        ({**GOOD, "metric": "regex", "target": "(" * 20_000 + ")" * 20_000}, "no regular expression"),
        ('{"prompt": "\\ud800", "metric": "exact", "target": "4"}', "surrogates"),
        ('{"prompt": "x", "metric": "exact", "target": NaN}', "NaN is no number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", line)
    with pytest.raises(InputError) as caught:
        read_tasks([path])
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert message in caught.value.message
    assert caught.value.next_step


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in [
        ("tasks.json", "are not .jsonl"),
        ("absent.jsonl", "cannot be read"),
        ("latin.jsonl", "cannot be read"),
        ("folder.jsonl", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            read_tasks([tmp_path / name])
        assert name in caught.value.message
    with pytest.raises(InputError, match=r"no tasks in .*empty\.jsonl"):
        read_tasks([write(tmp_path / "empty.jsonl", "", " ")])
    with pytest.raises(InputError, match="no tasks in no file"):
        read_tasks([])


def test_ids_are_there_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {**GOOD, "id": "x"})
    second = write(tmp_path / "b.jsonl", GOOD, {**GOOD, "id": "x"})
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: the id 'x' is there twice"):
        read_tasks([first, second])


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        (" 4\n", "4", True),
        ("a \u00a0\u3000 b", "a b", True),
        ("e\u0301", "\u00e9", True),
        ("\uff14", "4", False),
        ("Yes", "yes", False),
        ("4.", "4", False),
        ("", " ", True),
    ],
)
def test_exact(text: str, target: str, same: bool) -> None:
    assert exact(text, target) is same
    assert score(task(metric="exact", target=target), text) == same
    assert score(task(metric="exact", target=("other", target)), text) == same


def test_regex() -> None:
    number = task(metric="regex", target=r"\b42\b")
    assert score(number, "It is 42.") == 1 and score(number, "It is 420.") == 0
    assert score(task(metric="regex", target=r"(?i)^\p{Script=Greek}+$"), "ΑΒΓ") == 1


def test_patterns_that_never_end_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: .*needs more than 1 s to search 2000 times"):
        read_tasks([write(tmp_path / "slow.jsonl", {**GOOD, "metric": "regex", "target": "(x+x+)+y"})])


def test_a_search_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Harmless on repetitions of any one character.
    slow = task(id="slow", metric="regex", target="(?:(?:xz)+(?:xz)+)+y")
    with pytest.raises(InputError, match=r"slow: the pattern needs more than .* for an answer of 8001 characters"):
        score(slow, "xz" * 4000 + "!")


def test_chrf_is_sacrebleus() -> None:
    pairs = [("the cat sat", "the cat sat on the mat"), ("猫が座った", "猫は座っていた"), ("x", "y"), ("", "y")]
    for text, target in pairs:
        expected = sentence_chrf(text, [target]).score / 100
        assert score(task(metric="chrf", target=target), text) == pytest.approx(expected)
    assert chrf("same", ["same"]) == 1 and chrf("x", ["y"]) == 0
    # The nearest of several counts.
    assert chrf("good morning", ["bye", "good morning"]) == 1


def test_chrf_by_hand() -> None:
    """Of one letter each beside one that matches: half of the unigrams, none of the bigrams."""
    assert chrf("ab", ["ac"]) == pytest.approx((0.5 + 0) / 2)


@pytest.mark.parametrize(
    ("log_p", "choices", "target", "expected"),
    [
        ((-1, -2), ("aa", "bb"), 0, 1),
        ((-2, -1), ("aa", "bb"), 0, 0),
        # A long one is not unlikely for its length: -3 / 6 against -1 / 1.
        ((-3, -1), ("aaaaaa", "b"), 0, 1),
        # Bytes, not characters: -3 / 3 against -2 / 1.
        ((-3, -2), ("好", "b"), 0, 1),
        ((-2, -2), ("aa", "bb"), 0, 1),
        ((-2, -2), ("aa", "bb"), 1, 0),
        ((math.nan, -9), ("aa", "bb"), 0, 0),
        ((math.nan, -9), ("aa", "bb"), 1, 1),
        ((math.nan, math.nan), ("aa", "bb"), 0, 0),
        ((-math.inf, -math.inf), ("aa", "bb"), 0, 0),
    ],
)
def test_choices(log_p: tuple[float, ...], choices: tuple[str, ...], target: int, expected: float) -> None:
    assert score_choice(task(metric="choice", choices=choices, target=target), log_p) == expected
