"""What can be refused is refused before a checkpoint or a bundle is read in whole, which takes minutes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builds import TARGET, THREADS, Run, Sample, small_checkpoint, write_target

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import EXIT_INPUT, EXIT_MACHINE, InputError
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.validation.behaviour.tasks import Task
from glmexport.workflows.build import build
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, validate_bundle


class Ask:
    """A command line and what it may be given wrongly."""

    def __init__(self, sample: Sample, place: Path, run: Run) -> None:
        self.sample, self.place, self.run = sample, place, run
        self.bundle = Path(shutil.copytree(sample.bundle, place / "bundle"))

    def refused(self, code: int, words: str, *arguments: str | Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in self.place.rglob("*") if path.is_file()}
        done = self.run(*arguments)
        assert done.code == code and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert {path: path.stat().st_mtime_ns for path in self.place.rglob("*") if path.is_file()} == before


@pytest.fixture
def ask(sample: Sample, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Ask:
    asked = Ask(sample, tmp_path, run)

    def read(path: Path, *_: object) -> str:
        raise AssertionError(f"{path} was read in whole")

    monkeypatch.setattr("glmexport.foundation.digests._read", read)
    # Of a graph the conversion has to know what it stores.
    monkeypatch.setattr("glmexport.bundle.manifest.verify_files", read)
    monkeypatch.setattr("glmexport.bundle.bundle.verify_files", read)
    return asked


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmexport.foundation.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))


def without_provider(bundle: Path) -> None:
    path = bundle / "bundle.json"
    manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    manifest["target"]["provider"] = {"name": "WebGpuExecutionProvider", "package": "onnxruntime-webgpu"}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def bad(place: Path, name: str = "bad.jsonl") -> Path:
    path = place / name
    path.write_text('{"title": 1}', encoding="utf-8")
    return path


WRONG: dict[str, Callable[[Path], list[str | Path]]] = {
    "evaluation": lambda place: ["--evaluation", bad(place)],
    "tasks": lambda place: ["--tasks", bad(place)],
    "policy": lambda place: ["--policy", bad(place, "policy.toml")],
}


@pytest.mark.parametrize("name", WRONG)
def test_files_of_a_build_and_of_a_validation(name: str, ask: Ask) -> None:
    more = WRONG[name](ask.place)
    ask.refused(EXIT_INPUT, "bad" if name != "policy" else "policy.toml", "build", ask.sample.checkpoint, "--target",
                TARGET, "--recipe", ask.sample.recipe, "-o", ask.place / "new" / "out", *more)  # fmt: skip
    ask.refused(EXIT_INPUT, "bad" if name != "policy" else "policy.toml", "validate", ask.bundle, "--against",
                ask.sample.checkpoint, *more)  # fmt: skip


def test_a_task_that_fills_the_context(ask: Ask) -> None:
    original = Original.open(str(ask.sample.checkpoint), Silent())
    task = Task(id="long", name="long", prompt="x" * 400, metric="exact", target="y")
    options = BuildOptions(THREADS, tasks=(task,))
    with pytest.raises(InputError, match=r"The task long has 40. tokens and the context 256"):
        validate_bundle(Bundle.open(ask.bundle), original, options, Silent())
    job = Job(open_target(TARGET), open_recipe(str(ask.sample.recipe)), ask.place / "new")
    with pytest.raises(InputError, match=r"The task long has 40. tokens and the context 256"):
        build(original, [job], options, Silent())


def test_a_provider_that_is_not_here(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    without_provider(ask.bundle)
    for more in ([], ["--plan"]):
        ask.refused(EXIT_MACHINE, "WebGpuExecutionProvider", "validate", ask.bundle, "--against",
                    ask.sample.checkpoint, *more)  # fmt: skip
    ask.refused(EXIT_MACHINE, "WebGpuExecutionProvider", "reference", ask.sample.checkpoint, "-o",
                ask.place / "reference", "--draft", ask.bundle)  # fmt: skip


def test_another_checkpoint(ask: Ask) -> None:
    small_checkpoint(ask.place / "other", hidden_size=64)
    for verb in (["validate", ask.bundle], ["convert", ask.bundle, "--to", "gptq", "-o", ask.place / "out"]):
        ask.refused(EXIT_INPUT, "was built from", *verb, "--against", ask.place / "other")
    ask.refused(EXIT_INPUT, "was built from", "reference", ask.place / "other", "-o", ask.place / "reference",
                "--draft", ask.bundle)  # fmt: skip


def test_outputs_that_exist(ask: Ask) -> None:
    taken = ask.place / "taken.toml"
    taken.mkdir()
    checkpoint = ask.sample.checkpoint
    for arguments in (
        ["reference", checkpoint],
        ["convert", ask.bundle, "--against", checkpoint, "--to", "gptq"],
        ["tune", checkpoint, "--target", TARGET],
    ):
        ask.refused(EXIT_INPUT, "exists", *arguments, "-o", taken)


def test_a_full_disk(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch)
    checkpoint = ask.sample.checkpoint
    for arguments in (
        ["reference", checkpoint, "-o", ask.place / "new" / "reference"],
        ["convert", ask.bundle, "--against", checkpoint, "--to", "gptq", "-o", ask.place / "new" / "gptq"],
        ["tune", checkpoint, "--target", TARGET, "-o", ask.place / "new" / "tuned.toml"],
        ["build", checkpoint, "--target", TARGET, "--recipe", ask.sample.recipe, "-o", ask.place / "new" / "out"],
    ):
        ask.refused(EXIT_MACHINE, "of disk", *arguments, *([] if arguments[0] in ("convert", "tune") else
                    ["--threads", THREADS]))  # fmt: skip


def test_a_tuning_on_a_provider_that_is_not_here(ask: Ask) -> None:
    target = write_target(ask.place, {'name = "CPUExecutionProvider"': 'name = "WebGpuExecutionProvider"'}, "web")
    ask.refused(EXIT_MACHINE, "WebGpuExecutionProvider", "tune", ask.sample.checkpoint, "--target", target, "-o",
                ask.place / "tuned.toml")  # fmt: skip
