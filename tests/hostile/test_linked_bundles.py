"""A bundle in the hub's cache, where files are links: it runs, is judged, and links to elsewhere stay refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builds import Run, Sample
from hub import cached

from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_INPUT, EXIT_MACHINE, EXIT_PASS


@pytest.fixture(params=[False, True], ids=["repository", "shared"])
def snapshot(request: pytest.FixtureRequest, sample: Sample, tmp_path: Path) -> Path:
    return cached(sample.bundle, tmp_path / "hub", shared=request.param)


def test_it_runs_as_the_bundle_does(snapshot: Path, sample: Sample, run: Run) -> None:
    arguments = ["-p", "Hello", "--max-tokens", 8, "--threads", 1, "--json"]
    done = run("run", snapshot, *arguments)
    assert done.code == EXIT_PASS, done.stderr
    assert done.stdout == run("run", sample.bundle, *arguments).stdout
    assert run("targets", "check", snapshot).code == EXIT_PASS


def test_it_is_validated(snapshot: Path, sample: Sample, run: Run) -> None:
    done = run("validate", snapshot, "--against", sample.checkpoint, "--threads", 1)
    assert done.code == EXIT_INCONCLUSIVE, done.stderr  # The text is too short for a verdict, as in the sample.
    assert (snapshot / "report.json").is_file()


def test_a_device_is_given_it(snapshot: Path, sample: Sample, run: Run) -> None:
    done = run("validate", snapshot, "--against", sample.checkpoint, "--threads", 1, "--device", "local")
    assert done.code == EXIT_INCONCLUSIVE, done.stderr


def test_nothing_is_left_in_the_cache(snapshot: Path, tmp_path: Path) -> None:
    """Not by this process, and not by one that was killed before it."""
    command = [sys.executable, "-m", "glmexport", "run", snapshot, "-p", "Hello", "--max-tokens", "1"]
    before = sorted((tmp_path / "hub").iterdir())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "hub" / f".glmexport-{ended.pid}-left").mkdir()
    (tmp_path / "hub" / f".glmexport-{ended.pid}-left.model.onnx").write_bytes(b"")
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert sorted((tmp_path / "hub").iterdir()) == before


@pytest.mark.parametrize("name", ["weights/block_000.data", "model.onnx", "tokenizer.json", "genai_config.json"])
def test_a_link_to_elsewhere(name: str, snapshot: Path, run: Run, tmp_path: Path) -> None:
    path = snapshot / name
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    done = run("run", snapshot, "-p", "Hello")
    assert done.code == EXIT_INPUT and name in done.stderr and "link" in done.stderr


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json"])
def test_a_link_to_nothing_or_itself(target: str, snapshot: Path, run: Run) -> None:
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(target)
    assert run("run", snapshot, "-p", "Hello").code == EXIT_INPUT


def test_a_cache_that_cannot_be_written(snapshot: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("glmexport.bundle.links.tempfile.mkdtemp", refuse)
    done = run("run", snapshot, "-p", "Hello")
    assert done.code == EXIT_MACHINE and "cp -rL" in done.stderr
