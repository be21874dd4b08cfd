"""A build by several ranks of torchrun: the same bundle, one display, and one plain message where it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builds import TARGET, THREADS, Sample, digests

import glmexport
from glmexport.foundation.errors import EXIT_INPUT, EXIT_PASS, MachineError
from glmexport.workflows.workers import run_workers

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ranked_build.py")
PATIENCE = 400


def build(sample: Sample, output: Path, *arguments: object, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Build the small checkpoint with so many ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    options = ["--target", TARGET, "--recipe", sample.recipe, "-o", output, *arguments]
    return subprocess.run(
        list(map(str, [*torchrun, SCRIPT, "build", *options])),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
        check=False,
    )


def messages(errors: str) -> list[str]:
    """Return the lines in which glmexport says that something is wrong."""
    return [line for line in errors.splitlines() if line.startswith("ERROR")]


def test_two_ranks_build_the_bundle_that_one_process_builds(sample: Sample, tmp_path: Path) -> None:
    done = build(sample, tmp_path / "bundle", sample.checkpoint, "--threads", THREADS)
    assert messages(done.stderr) == [], done.stderr
    assert digests(tmp_path / "bundle") == digests(sample.bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    # One rank tells of the progress.
    assert len(re.findall(r"^Quantizing .*4/4", done.stderr, re.MULTILINE)) == 1
    assert len(re.findall(r"^ranks +2", done.stderr, re.MULTILINE)) == 1
    assert len(re.findall(r"^Bundle in ONNX Runtime", done.stderr, re.MULTILINE)) == 1
    alone = build(sample, tmp_path / "alone", sample.checkpoint, "--threads", THREADS, count=1)
    assert messages(alone.stderr) == [], alone.stderr
    figures, expected = (json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("bundle", "alone"))
    for name in ("fidelity", "behaviour", "shares", "routing", "weights", "prompts", "reference", "gates", "verdict"):
        assert figures[name] == expected[name], name
    assert figures["behaviour"]["overall"]["answers"] > 20


@pytest.mark.release
def test_ranks_that_judge_by_different_text_are_refused(sample: Sample, tmp_path: Path) -> None:
    for rank, text in enumerate(("One text of mine, which is judged.", "Another text of mine, which is judged.")):
        (tmp_path / f"{rank}.txt").write_text(text, encoding="utf-8")
    own = [f"{rank}:--evaluation={tmp_path / f'{rank}.txt'}" for rank in (0, 1)]
    done = build(sample, tmp_path / "bundle", sample.checkpoint, "--threads", THREADS, *own)
    (message,) = messages(done.stderr)
    assert "The evaluation text of rank 1 is " in message
    assert not (tmp_path / "bundle").exists()


def test_ranks_that_are_told_different_things_are_refused(sample: Sample, tmp_path: Path) -> None:
    done = build(sample, tmp_path / "bundle", sample.checkpoint, "0:--threads=1", "1:--threads=2")
    (message,) = messages(done.stderr)
    assert "The threads of rank 1 is 2, and that of rank 0 is 1." in message
    assert f"exitcode  : {EXIT_INPUT} " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_one_rank_is_told_once_and_ends_all(sample: Sample, tmp_path: Path) -> None:
    done = build(sample, tmp_path / "bundle", f"0:{sample.checkpoint}", f"1:{tmp_path / 'absent'}", "--threads=1")
    (message,) = messages(done.stderr)
    assert message.startswith("ERROR Rank 1 of 2: ") and "absent" in message
    assert list(tmp_path.iterdir()) == []


def test_workers_are_ranks_that_one_command_starts(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    command = [sys.executable, "-m", "glmexport", "build", absent, "--workers", "2", "-o", str(tmp_path / "bundle")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(glmexport.__file__).parents[1])},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == EXIT_INPUT, done.stderr
    message, _next_step = done.stderr.splitlines()
    assert re.match(r"ERROR Rank [01] of 2: .*absent", message)


RANK = "import os, signal; rank = int(os.environ['RANK']);"


def test_the_exit_code_of_workers_is_that_of_the_first_to_fail() -> None:
    assert run_workers(2, ["-c", f"{RANK} print(rank)"]) == EXIT_PASS
    assert run_workers(2, ["-c", f"{RANK} raise SystemExit(2 * rank)"]) == 2
    with pytest.raises(MachineError, match="Rank 1 of 2 was ended by signal 9"):
        run_workers(2, ["-c", f"{RANK} rank and os.kill(os.getpid(), signal.SIGKILL)"])
