"""A build that is killed at any moment goes on where it stopped, and ends in the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builds import TARGET, THREADS, Sample, digests

import glmexport
from glmexport.foundation.errors import EXIT_INPUT, EXIT_INTERRUPTED

pytestmark = pytest.mark.slow

#: Generous: the machine may be busy with other things.
PATIENCE = 240.0
#: What appears in the course of a build, in order; each process is killed a little after one of these.
MOMENTS = (
    ".glmexport-work-*/embedding.json",
    ".glmexport-work-*/block_000.json",
    ".bundle.partial/weights",
    ".bundle.partial/bundle.json",
)


class Command:
    """``python -m glmexport build`` of the small checkpoint, again and again."""

    def __init__(self, sample: Sample, output: Path) -> None:
        self.place = output.parent
        options = ["--target", TARGET, "--recipe", sample.recipe, "--threads", THREADS, "-o", output]
        self.line = [sys.executable, "-m", "glmexport", "build", str(sample.checkpoint), *map(str, options)]
        self.environment = os.environ | {"PYTHONPATH": str(Path(glmexport.__file__).parents[1])}

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.line,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=self.environment,
            # A group of its own, so that its measuring children can be ended with it.
            start_new_session=True,
        )

    def stop(self, moment: str, delay: float, sent: signal.Signals) -> tuple[int, str]:
        """Start, wait until ``moment`` has come and ``delay`` s more, send the signal; (exit code, stderr)."""
        before = self.versions(moment)
        process = self.start()
        deadline = time.monotonic() + PATIENCE
        while not self.versions(moment) - before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(sent)
        _, errors = process.communicate(timeout=PATIENCE)
        if sent == signal.SIGKILL:
            end_group(process.pid)
        return process.returncode, errors

    def versions(self, moment: str) -> set[int]:
        """Times of change, so that what an earlier process left is told from what this one makes."""
        times = set()
        for path in self.place.glob(moment):
            with contextlib.suppress(FileNotFoundError):
                times.add(path.stat().st_mtime_ns)
        return times

    def finish(self) -> tuple[int, str]:
        process = self.start()
        _, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, errors


def end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Shells start what runs in the background deaf to SIGINT, and children inherit that; not these."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_build_goes_on(sample: Sample, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    command = Command(sample, output)
    chance = random.Random(7)
    for moment in MOMENTS:
        code, errors = command.stop(moment, chance.uniform(0, 0.3), signal.SIGKILL)
        assert "Traceback" not in errors
        if output.exists():
            break
        assert code == -signal.SIGKILL
        # Until the last moment there is no bundle, and afterwards a whole one.
        assert not output.exists()
    code, errors = command.finish()
    if code == EXIT_INPUT:
        assert "exists" in errors
    else:
        assert code < EXIT_INPUT, errors
        assert "Resuming after" in errors
    assert digests(output) == digests(sample.bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[-1]])
def test_an_interrupted_build_says_how_to_go_on(moment: str, sample: Sample, tmp_path: Path) -> None:
    command = Command(sample, tmp_path / "bundle")
    code, errors = command.stop(moment, 0.05, signal.SIGINT)
    assert code == EXIT_INTERRUPTED, errors
    assert "Interrupted." in errors and "same command again" in errors
    assert "Traceback" not in errors
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".glmexport-work-")
    # The step that was committed is there to go on from.
    assert (left / "embedding.json").is_file()
