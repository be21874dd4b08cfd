"""No command lets what strangers wrote command a terminal: not a name, not a template, not an error about them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from builds import Run, Sample

from glmexport.bundle.manifest import MANIFEST
from glmexport.cli.console import PlainConsole, Terminal, emit, say
from glmexport.report.document import JSON_NAME

HOSTILE = "x\x1b[2J\x1b]0;t\x07\x9b31m\u202e\nERROR [bold]a[/bold][/]\r\x08\u2028"
#: What a terminal obeys, or what reorders a line of it.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def clean(text: str) -> None:
    # A console that is no terminal writes no commands of its own.
    assert not COMMANDS.search(text.replace("\r\n", "\n")), COMMANDS.search(text)


@pytest.fixture
def bundle(sample: Sample, tmp_path: Path) -> Path:
    """A bundle whose manifest, report and template have hostile texts."""
    place = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    document = json.loads((place / MANIFEST).read_text())
    document["source"]["name"] = document["recipe"]["name"] = document["family"] = HOSTILE
    document["target"]["name"] = document["target"]["summary"] = HOSTILE
    (place / MANIFEST).write_text(json.dumps(document))
    report = json.loads((place / JSON_NAME).read_text())
    for key in ("bundle", "target", "recipe", "family", "checkpoint"):
        report["subject"][key] = HOSTILE
    report["limits"] = [HOSTILE]
    (place / JSON_NAME).write_text(json.dumps(report))
    return place


@pytest.mark.parametrize(
    "command",
    [
        ("run", "BUNDLE", "-p", "Hello", "--max-tokens", "2"),
        ("run", "BUNDLE", "-p", "Hello", "--max-tokens", "2", "--json"),
        ("report", "BUNDLE"),
        ("report", "BUNDLE", "--json"),
        ("compare", "BUNDLE", "BUNDLE"),
        ("compare", "BUNDLE", "BUNDLE", "--json"),
        ("targets", "check", "BUNDLE"),
        ("targets", "check", "BUNDLE", "--json"),
        ("verify", "BUNDLE", "--key", "BUNDLE/bundle.json"),
        ("sign", "BUNDLE", "--key", "BUNDLE/bundle.json"),
        ("inspect", "BUNDLE"),
        ("validate", "BUNDLE"),
        ("package", "BUNDLE", "-o", "BUNDLE.kit"),
        ("unpack", "BUNDLE", "-o", "BUNDLE.out"),
    ],
    ids=" ".join,
)
def test_a_bundle_of_hostile_texts(command: tuple[str, ...], bundle: Path, run: Run) -> None:
    done = run(*(word.replace("BUNDLE", str(bundle)) for word in command))
    assert "Traceback" not in done.stderr, done.stderr
    clean(done.stdout)
    clean(done.stderr)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("verb", ["inspect", "build"])
def test_a_checkpoint_of_hostile_texts(name: str, verb: str, sample: Sample, tmp_path: Path, run: Run) -> None:
    checkpoint = Path(shutil.copytree(sample.checkpoint, tmp_path / "checkpoint"))
    path = checkpoint / name
    document = json.loads(path.read_text()) if path.is_file() else {}
    document |= {"model_type": HOSTILE, "weight_map": {HOSTILE: HOSTILE}, "bos_token": HOSTILE}
    document["auto_map"] = {HOSTILE: 1}
    path.write_text(json.dumps(document))
    done = run(verb, checkpoint, *(("-o", tmp_path / "out", "--target", "host") if verb == "build" else ()))
    assert done.code != 0
    clean(done.stdout)
    clean(done.stderr)


def test_every_way_to_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    assert isinstance(terminal.console, PlainConsole)
    terminal.remark(HOSTILE)
    terminal.facts(HOSTILE, {HOSTILE: HOSTILE})
    terminal.console.print(HOSTILE)
    with terminal.track(HOSTILE, 2) as track:
        track.advance(detail=HOSTILE)
    say("ERROR", HOSTILE, HOSTILE)
    emit(HOSTILE)
    emit(json.dumps({HOSTILE: HOSTILE}, ensure_ascii=False, indent=1))
    out, err = capsys.readouterr()
    clean(out)
    clean(err)
    assert "[bold]a[/bold][/]" in err
    # What follows in a message begins no line as a message does.
    assert err.count("\nERROR x") == 1 and err.count("\n      ERROR [bold]") == 2
    document = out[out.index("\n{") :]
    assert json.loads(document) == {HOSTILE: HOSTILE}


def test_a_log_is_told_of_a_long_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("glmexport.cli.console.time.monotonic", lambda: now)
    with Terminal().track("Quantizing", 8) as track:
        for step in range(8):
            now += 45.0
            track.advance(1, f"block_{step}")
    lines = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    # Each is at least a minute after the one before; the end has a line of its own.
    assert [line.split() for line in lines] == [
        ["Quantizing", "2/8,", "0:01:30,", "about", "0:04:30", "left", "block_1"],
        ["Quantizing", "4/8,", "0:03:00,", "about", "0:03:00", "left", "block_3"],
        ["Quantizing", "6/8,", "0:04:30,", "about", "0:01:30", "left", "block_5"],
    ]
