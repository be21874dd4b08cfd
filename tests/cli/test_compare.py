"""``compare`` and ``report`` on the command line: exit codes, one JSON document, and nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from builds import Outcome, Run

from glmexport.foundation.errors import EXIT_BLOCK, EXIT_INCONCLUSIVE, EXIT_INPUT, EXIT_MACHINE, EXIT_PASS
from glmexport.report.comparison import Comparison
from glmexport.report.document import Report, schema_text
from glmexport.report.write import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from sample_report import estimate, make_report

RENDERINGS = ("report.html", "report.md", "report.xml")


@pytest.fixture
def report() -> Report:
    return make_report(layers=2)


@pytest.fixture
def old(report: Report, tmp_path: Path) -> Path:
    write_report(report, tmp_path / "old")
    return tmp_path / "old"


def write_changed(report: Report, directory: Path, factor: float, minimum: int = 500) -> Path:
    """The report with another divergence in Arabic."""
    rows = tuple(
        row.model_copy(update={"kl": estimate(row.kl_mean_nats * factor, "positive", row.positions)})
        if row.language == "ar"
        else row
        for row in report.fidelity.languages
    )
    gates = report.policy.gates.model_copy(update={"minimum_positions": minimum})
    changes = {
        "fidelity": report.fidelity.model_copy(update={"languages": rows}),
        "policy": report.policy.model_copy(update={"gates": gates}),
    }
    write_report(report.model_copy(update=changes), directory)
    return directory


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code and outcome.stdout == "" and "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("ERROR ")
    for word in words:
        assert word in outcome.stderr


@pytest.mark.parametrize(
    ("factor", "minimum", "code", "outcome"),
    [
        (1.0, 500, EXIT_PASS, "no worse"),
        (0.2, 500, EXIT_PASS, "no worse"),
        (3.0, 500, EXIT_BLOCK, "worse"),
        (1.01, 100_000, EXIT_INCONCLUSIVE, "undecided"),
    ],
)
def test_exit_codes(
    run: Run, report: Report, old: Path, tmp_path: Path, factor: float, minimum: int, code: int, outcome: str
) -> None:
    new = write_changed(report, tmp_path / "new", factor, minimum)
    result = run("compare", old / "report.json", new, "--json")
    assert result.code == code, result.stderr
    assert result.stderr.splitlines()[-1] == f"outcome  {outcome}"
    document = result.document
    assert document["outcome"] == outcome
    assert Comparison.model_validate(document).model_dump(mode="json") == document
    quiet = run("compare", old, new)
    assert (quiet.code, quiet.stdout, quiet.stderr) == (code, "", result.stderr)


def test_only_significant_changes_are_printed(run: Run, report: Report, old: Path, tmp_path: Path) -> None:
    outcome = run("compare", old, write_changed(report, tmp_path / "new", 3.0))
    lines = outcome.stderr.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("Mean KL divergence") and "significantly" not in line]
    assert row[3:6] == ["ar", "0.0412", "0.1236"] and row[6] == "+0.0824" and row[-2:] == ["<", "0.001"]
    tests = 3 * (len(report.fidelity.languages) + 1) + 3  # of speed
    assert f"~ {tests - 1} of {tests} tested figures: no significant change" in lines
    assert "Mean KL divergence is significantly worse: ar." in lines


def test_confidence(run: Run, report: Report, old: Path, tmp_path: Path) -> None:
    new = write_changed(report, tmp_path / "new", 1.4)
    assert run("compare", old, new, "--confidence", "0.6").code == EXIT_BLOCK
    assert run("compare", old, new, "--confidence", "0.999").code == EXIT_PASS
    assert run("compare", old, new, "--confidence", "1").code == EXIT_INPUT


def test_foreign_words_do_nothing_to_the_terminal(run: Run, report: Report, old: Path, tmp_path: Path) -> None:
    words = "a\x1b[31m[bold]b\u202e\n[/]"
    subject = report.subject.model_copy(
        update=dict.fromkeys(("bundle", "recipe", "adapter", "adapter_digest"), words)
    )
    write_report(report.model_copy(update={"subject": subject}), tmp_path / "new")
    outcome = run("compare", old, tmp_path / "new")
    assert outcome.code == EXIT_PASS, outcome.stderr
    assert "\x1b" not in outcome.stderr and "\u202e" not in outcome.stderr
    assert "a‹U+001B›[31m[bold]b‹U+202E›↵[/]" in outcome.stderr


def test_what_cannot_be_compared(run: Run, report: Report, old: Path, tmp_path: Path) -> None:
    refused(run("compare", old, tmp_path / "no", "--json"), EXIT_INPUT, "no readable report", "no", "validate wrote")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run("compare", empty, old), EXIT_INPUT, "no readable report", "empty/report.json")
    broken = tmp_path / "broken.json"
    broken.write_bytes((old / "report.json").read_bytes()[:-30])
    refused(run("compare", old, broken), EXIT_INPUT, "broken.json", "no JSON")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    refused(run("compare", tmp_path / "list.json", old), EXIT_INPUT, "list.json")
    rows = tuple(row.model_copy(update={"language": f"x-{row.language}"}) for row in report.fidelity.languages)
    fidelity = report.fidelity.model_copy(update={"languages": rows, "worst_language": "x-ar"})
    write_report(report.model_copy(update={"fidelity": fidelity}), tmp_path / "other")
    refused(run("compare", old, tmp_path / "other"), EXIT_INPUT, "no language in common")


def test_rendering_again(run: Run, old: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    for name in RENDERINGS:
        (old / name).write_text("stale", encoding="utf-8")
    outcome = run("report", "render", old / "report.json", "--json")
    assert outcome.code == EXIT_PASS, outcome.stderr
    assert outcome.document["files"] == [str(old / name) for name in RENDERINGS]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    elsewhere = tmp_path / "elsewhere" / "deep"
    quiet = run("report", "render", old, "-o", elsewhere)
    assert (quiet.code, quiet.stdout) == (EXIT_PASS, "")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert run("report", "render", old, "-o", elsewhere).code == EXIT_PASS


def test_the_json_is_left_as_it_is(run: Run, old: Path) -> None:
    """Written by hand, or by a program with other habits."""
    path = old / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    before = path.read_bytes()
    assert run("report", "render", path).code == EXIT_PASS
    assert path.read_bytes() == before


def test_renderings_of_another_validation_are_not_overwritten(
    run: Run, report: Report, old: Path, tmp_path: Path
) -> None:
    new = write_changed(report, tmp_path / "new", 2.0)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    refused(run("report", "render", new, "-o", old), EXIT_INPUT, "of another validation", "-o")
    shutil.copyfile(new / "report.json", old / "later.json")
    refused(run("report", "render", old / "later.json"), EXIT_INPUT, "of another validation")
    (old / "later.json").unlink()
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_what_cannot_be_rendered(run: Run, old: Path, tmp_path: Path) -> None:
    refused(run("report", "render", tmp_path / "no.json"), EXIT_INPUT, "no readable report")
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    refused(run("report", "render", old, "-o", file), EXIT_MACHINE, "cannot be written")
    assert file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_schema(run: Run, flags: tuple[str, ...]) -> None:
    outcome = run("report", "schema", *flags)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (EXIT_PASS, schema_text(), "")
