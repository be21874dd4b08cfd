"""What the benchmarks tell of processes that they watch, and the points at which one of them kills."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks.kills import points
from benchmarks.processes import Cost, Watched
from glmexport.cli.console import Terminal

MIB = 2**20
#: A process that takes its input for permission to go on.
HOLDS = """
import time
from glmexport.cli.console import Terminal

terminal = Terminal()
with terminal.track("First stage", 2) as track:
    held = bytearray(64 << 20)
    held[:: 4096] = b"x" * len(held[:: 4096])
    track.advance(2, "a detail")
del held
with terminal.track("Second, longer stage's name", 1) as track:
    track.advance()
print("ready", flush=True)
time.sleep(600)
"""


def ends(program: str, log: Path) -> Watched:
    return Watched([sys.executable, "-c", program], log)


def test_stages_are_those_of_the_log_and_add_up(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def ready(cost: Cost) -> bool:
        return b"ready" in log.read_bytes()

    watched = ends(HOLDS, log)
    cost = watched.finish(ready)
    assert cost.killed and cost.exit_code == -9 and not psutil.pid_exists(watched.process.pid)
    assert [stage.name for stage in cost.stages] == ["First stage", "Second, longer stage's name", "(the rest)"]
    for name in ("wall_s", "processor_s"):
        assert sum(getattr(stage, name) for stage in cost.stages) == pytest.approx(getattr(cost, name))
    assert cost.peak_bytes > 64 * MIB and cost.peak_child_bytes == 0
    assert str(tmp_path) not in str(cost.document()) and cost.document()["command"].startswith("python")


def test_children_are_counted_and_do_not_outlive_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; held = bytearray(1 << 26); print(len(held),"
        " flush=True); time.sleep(600)'])\n"
        "print('child', child.pid, flush=True); time.sleep(600)"
    )
    seen = 0

    def ready(cost: Cost) -> bool:
        nonlocal seen
        seen = cost.peak_child_bytes
        return str(1 << 26) in log.read_text(encoding="utf-8") and seen > 0

    ends(program, log).finish(ready)
    child = int(log.read_text(encoding="utf-8").partition("child ")[2].split()[0])
    assert seen > 0
    # One that nobody has waited for is dead all the same.
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_an_interruption_leaves_no_process(tmp_path: Path) -> None:
    def interrupted(cost: Cost) -> bool:
        raise KeyboardInterrupt

    watched = ends("import time; time.sleep(600)", tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        watched.finish(interrupted)
    assert not psutil.pid_exists(watched.process.pid) and watched.cost.killed


def test_the_log_of_a_stage_is_the_command_lines_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmarks read what people read; this fails if its form changes."""
    from benchmarks.processes import _STAGE

    with Terminal().track("Quantizing", 3) as track:
        track.advance(3, "head")
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [_STAGE.match(line)["name"] for line in lines if _STAGE.match(line)] == ["Quantizing"]  # type: ignore[index]


def test_points_are_in_every_block_and_the_same_for_a_seed() -> None:
    chosen = points(10, 3, 5)
    assert chosen == points(10, 3, 5) != points(10, 3, 6)
    assert len(chosen) == 10 and set(Counter(kill.block for kill in chosen)) == {0, 1, 2}
    assert [kill.block for kill in chosen] == sorted(kill.block for kill in chosen)
    assert sum(kill.writing for kill in chosen) == 3 and all(0 <= kill.share < 1 for kill in chosen)
