"""Both models answer freely: the same of a captured original, and with tasks of the user's among them."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import pytest
from builds import QUICK, THREADS, TURNS, Run, Sample, no_turns, small_checkpoint

from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import EXIT_INPUT, BundleError
from glmexport.foundation.progress import Silent
from glmexport.report.document import Report, read_report
from glmexport.results.record import Verdict
from glmexport.validation.behaviour.plane import BundleSessions
from glmexport.validation.behaviour.questions import Question
from glmexport.validation.behaviour.tasks import read_tasks
from glmexport.validation.capture import REFERENCE, CapturedReference
from glmexport.validation.conditions import BehaviourPlan
from glmexport.validation.speed import MeasurementTurns
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, validate_bundle, validate_captured_bundle

PLAN = replace(QUICK, behaviour=BehaviourPlan(each=1, translations=1, max_tokens=12, batch=3))


@pytest.fixture(scope="module")
def captured(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("captured") / "ref"
    options = CaptureOptions(THREADS, PLAN, top_k=16, draft=Bundle.open(sample.bundle))
    capture_reference(Original.open(str(sample.checkpoint), Silent()), directory, options, Silent())
    return directory


@pytest.fixture
def bundle(sample: Sample, tmp_path: Path) -> Path:
    return shutil.copytree(sample.bundle, tmp_path / "bundle")


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands ask for free answers too."""
    monkeypatch.setattr(builds, "QUICK", PLAN)


def test_a_captured_original_has_answered_the_same(sample: Sample, captured: Path, bundle: Path) -> None:
    options = BuildOptions(THREADS, validation=PLAN)
    original = Original.open(str(sample.checkpoint), Silent())
    whole = validate_bundle(Bundle.open(bundle), original, options, Silent()).report.behaviour
    reference = CapturedReference.open(captured)
    kept = validate_captured_bundle(Bundle.open(bundle), reference, options, Silent()).report.behaviour
    assert whole is not None and whole.passes >= 1 and whole.overall.answers >= 21
    assert kept == whole.model_copy(update={"passes": 0, "tokens_computed": 0, "tokens_needed": 0})
    assert 0 < whole.tokens_computed <= 1.3 * whole.tokens_needed and whole.answers_recomputed == 0
    # A sum over languages is the whole.
    for name in ("answers", "identical", "tokens_original", "tokens_bundle", "ended_bundle", "loops_bundle", "drifted"):
        assert sum(getattr(row, name) for row in whole.languages) == getattr(whole.overall, name), name
    assert whole.concurrency is not None and whole.concurrency.batch == 3
    assert 2 <= whole.concurrency.prompts < whole.overall.answers


def test_the_report_shows_and_gates_them(sample: Sample, captured: Path, bundle: Path, run: Run, asking: None) -> None:
    outcome = run("validate", bundle, "--reference", captured, "--threads", THREADS)
    report: Report = read_report(bundle / "report.json")
    assert "Free answers" in outcome.stderr
    names = {gate.name for gate in report.gates}
    assert {"ln of lengths of answers, bundle / original", "More answers that do not end"} <= names
    assert "Free answers" in (bundle / "report.md").read_text(encoding="utf-8")
    assert "Tokens computed for these answers" not in outcome.stderr
    assert "Free answers were not compared" not in " ".join(report.limits)


def test_fewer_questions_and_none(sample: Sample, bundle: Path, tmp_path: Path, run: Run, asking: None) -> None:
    command = ("validate", bundle, "--against", sample.checkpoint, "--threads", THREADS, "--questions")
    assert run(*command, 1).code < EXIT_INPUT
    asked = read_report(bundle / "report.json").behaviour
    assert asked is not None and [row.answers for row in asked.languages] == [1] * len(asked.languages)
    assert run(*command, 0).code < EXIT_INPUT
    report = read_report(bundle / "report.json")
    assert report.behaviour is None and "Free answers were not compared" in " ".join(report.limits)
    assert run(*command, 0, "--tasks", tasks(tmp_path / "own.jsonl")).code < EXIT_INPUT
    asked = read_report(bundle / "report.json").behaviour
    assert asked is not None and asked.overall.answers == 2 and len(asked.tasks) == 3


def test_long_texts_are_not_answered_together(sample: Sample) -> None:
    """Caches of all of them are as long as the longest."""
    sessions = BundleSessions.for_bundle(Bundle.open(sample.bundle), THREADS)
    short, long = (
        Question(id="q", kind="task", language=None, ids=[1] * length, max_tokens=48) for length in (2000, 2001)
    )
    progress = Silent()
    assert sessions.batch(BehaviourPlan(batch=3), [short, short], progress) == 3 and not progress.remarks
    assert sessions.batch(BehaviourPlan(batch=3), [short, long], progress) == 0
    assert "2049 tokens: prompts are answered one by one" in progress.remarks[0]
    assert sessions.batch(BehaviourPlan(batch=0), [short], progress) == 0


def test_a_captured_original_answers_its_own_questions(captured: Path, bundle: Path, run: Run) -> None:
    outcome = run("validate", bundle, "--reference", captured, "--questions", 3)
    assert outcome.code == EXIT_INPUT and "--questions belongs to --against" in outcome.stderr


def tasks(path: Path, *more: dict[str, object]) -> Path:
    lines: list[dict[str, object]] = [
        {"prompt": "1 + 1 =", "metric": "choice", "choices": [" 2", " 3"], "target": 0},
        {"id": "any", "prompt": "Say something.", "metric": "regex", "target": "(?s).*", "max_tokens": 3},
        {"prompt": "Say nothing.", "metric": "exact", "target": ["no", "never said"], "name": "silence"},
        *more,
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_tasks_of_the_user(sample: Sample, bundle: Path, tmp_path: Path, run: Run, asking: None) -> None:
    own = tasks(tmp_path / "own.jsonl")
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--threads", THREADS, "--tasks", own)
    assert "Traceback" not in outcome.stderr
    report = read_report(bundle / "report.json")
    assert report.behaviour is not None
    assert "Tokens computed for these answers" in outcome.stderr
    groups = {(group.name, group.metric): group for group in report.behaviour.tasks}
    assert groups.keys() == {("own", "choice"), ("own", "regex"), ("silence", "exact")}
    assert (groups["own", "regex"].original, groups["own", "regex"].bundle) == (1, 1)
    assert (groups["silence", "exact"].original, groups["silence", "exact"].bundle) == (0, 0)
    judged = {gate.name: gate.verdict for gate in report.gates if gate.name.startswith("Score lost")}
    # One task can tell of no loss of 5 %.
    assert judged["Score lost in own (regex)"] is Verdict.INCONCLUSIVE and len(judged) == 3


@pytest.mark.parametrize("against", ["checkpoint", "capture"])
def test_one_session_is_open_at_a_time(
    against: str, sample: Sample, captured: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each has a copy of all weights, so that two of a large bundle would not fit."""
    opened: list[tuple[str, int]] = []
    alive: weakref.WeakSet[object] = weakref.WeakSet()

    def counted(kind: type) -> None:
        begin = kind.__init__  # type: ignore[misc]

        def counting(self: object, *values: Any, **named: Any) -> None:
            opened.append((kind.__name__, len(alive)))
            alive.add(self)
            begin(self, *values, **named)

        monkeypatch.setattr(kind, "__init__", counting)

    def turns(*values: Any) -> list[MeasurementTurns]:
        opened.append(("speed", len(alive)))
        return no_turns(*values)

    counted(ScoringSession)
    counted(GenerationSession)
    monkeypatch.setattr(TURNS, turns)
    options = BuildOptions(THREADS, validation=PLAN, tasks=tuple(read_tasks([tasks(tmp_path / "own.jsonl")])))
    if against == "capture":
        reference = CapturedReference.open(captured)
        validate_captured_bundle(Bundle.open(bundle), reference, replace(options, tasks=()), Silent())
        expected = ["ScoringSession", "speed", "GenerationSession", "GenerationSession"]
    else:
        original = Original.open(str(sample.checkpoint), Silent())
        validate_bundle(Bundle.open(bundle), original, options, Silent())
        expected = ["ScoringSession", "ScoringSession", "GenerationSession", "GenerationSession", "speed"]
    assert opened == [(name, 0) for name in expected]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "x", "metric": "regex", "target": "("}, "line 4"),
        ({"prompt": "x " * 4000, "metric": "exact", "target": "y"}, "context"),
        ({"prompt": "x", "metric": "regex", "target": "y", "id": "any"}, "twice"),
    ],
)
def test_tasks_that_cannot_be_asked(
    line: dict[str, object], told: str, sample: Sample, bundle: Path, tmp_path: Path, run: Run, asking: None
) -> None:
    before = (bundle / "report.json").read_bytes()
    own = tasks(tmp_path / "own.jsonl", line)
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--threads", THREADS, "--tasks", own)
    assert outcome.code == EXIT_INPUT and told in outcome.stderr and "Traceback" not in outcome.stderr
    assert (bundle / "report.json").read_bytes() == before


def test_tasks_need_the_original(captured: Path, bundle: Path, tmp_path: Path, run: Run) -> None:
    outcome = run("validate", bundle, "--reference", captured, "--tasks", tasks(tmp_path / "own.jsonl"))
    assert outcome.code == EXIT_INPUT and "--against" in outcome.stderr


def test_only_its_own_bundle_drafts(sample: Sample, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "other", "glm")
    options = CaptureOptions(THREADS, PLAN, draft=Bundle.open(sample.bundle))
    with pytest.raises(BundleError, match="was built from"):
        capture_reference(Original.open(str(tmp_path / "other"), Silent()), tmp_path / "ref", options, Silent())
    assert not (tmp_path / "ref").exists()


def beyond(answer: dict[str, list[int]]) -> None:
    answer["tokens"][0] = 1 << 20


def negative(answer: dict[str, dict[str, list[int]]]) -> None:
    answer["question"]["ids"][0] = -1


def nothing(answer: dict[str, dict[str, list[int]]]) -> None:
    answer["question"]["ids"] = []


@pytest.mark.parametrize("damage", [beyond, negative, nothing], ids=lambda damage: damage.__name__)
def test_damaged_answers_are_told(damage: Callable[[object], None], captured: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(captured, tmp_path / "ref")
    capture = json.loads((copied / REFERENCE).read_text(encoding="utf-8"))
    damage(capture["answers"][1])
    (copied / REFERENCE).write_text(json.dumps(capture), encoding="utf-8")
    with pytest.raises(BundleError, match="no prompt, or a token outside"):
        CapturedReference.open(copied)
