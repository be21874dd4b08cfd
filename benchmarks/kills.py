"""A build killed without warning at random points of its first blocks: what it has committed is the same to the byte.

    python -m benchmarks.kills CHECKPOINT FOLDER [--blocks N] [--kills N] [--seed N] [--recipe R] [--threads N]
        [--output FILE]

First the build goes undisturbed until the first blocks are committed, and is stopped. Then it begins anew elsewhere and
is killed (SIGKILL, with its children) again and again, each time somewhere in the block under way: at a random share of
the time that the block took undisturbed, or, every third time, while the block's files are being written. In the end
it goes on undisturbed. Compared are the SHA-256 of all files of every step that both have committed, the hidden states
that were passed on among them, and those of the files that are still there are computed anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Cost, Watched, glmexport
from glmexport.foundation import machine
from glmexport.foundation.files import sha256
from glmexport.quantization.names import EMBEDDING, block_step

#: A commit takes seconds at most, of which the first samples see some.
_POLL_S = 0.02
#: Every so many kills, one is while files are written.
_WRITING = 3


@dataclass(frozen=True)
class Kill:
    """A point at which the build is killed: in a block, at a share of its time or as soon as files are written."""

    block: int
    share: float
    writing: bool


class Walk:
    """The builds in one folder, as far as they commit."""

    def __init__(self, folder: Path, arguments: list[object]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self._arguments = folder, arguments
        #: The second at which each step was seen committed, in the process under way.
        self.seen: dict[str, float] = {}

    def go(self, poll: Callable[[float], bool]) -> Cost:
        """Build until ``poll``, which is given the seconds since the start, returns True."""
        self.seen, started = {}, time.monotonic()

        def look(_: Cost) -> bool:
            now = time.monotonic() - started
            for name in self.records():
                self.seen.setdefault(name, now)
            return poll(now)

        command = glmexport("build", *self._arguments, "--output", self.folder / "bundle")
        cost = Watched(command, self.folder / "build.log").finish(look, _POLL_S)
        if not cost.killed:
            raise SystemExit(f"The build ended by itself, with {cost.exit_code}; see {self.folder / 'build.log'}.")
        return cost

    def until(self, step: str) -> Cost:
        """Build until ``step`` is committed, and kill it then."""
        return self.go(lambda _: step in self.seen)

    def killed_at(self, kill: Kill, seconds: float) -> tuple[float, bool]:
        """Build on, and kill it there; ``seconds`` is what the block takes. Return when, and whether it was done."""
        before = block_step(kill.block - 1) if kill.block else EMBEDDING
        step = block_step(kill.block)
        waited = 0.0

        def due(now: float) -> bool:
            nonlocal waited
            if before not in self.seen or not self._begun():
                return False
            waited = waited or now
            if kill.writing:
                return step in self.seen or any(self._work().glob(f"{step}.*"))
            return now - waited >= kill.share * seconds

        # The log of a resumed build says so when its walk begins; that of the first one has nothing to say.
        self._log_size = (self.folder / "build.log").stat().st_size if (self.folder / "build.log").exists() else 0
        self._resumed = bool(self.records())
        self.go(due)
        return kill.share * seconds, step in self.records()

    def _begun(self) -> bool:
        if not self._resumed:
            return True
        with (self.folder / "build.log").open("rb") as log:
            log.seek(self._log_size)
            return b"Resuming after" in log.read()

    def _work(self) -> Path:
        return next(self.folder.glob(".glmexport-work-*"), self.folder / "none")

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the record of every committed step."""
        found = {}
        for path in self._work().glob("*.json"):
            if path.name != "job.json":
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def digests(self, steps: list[str]) -> dict[str, str]:
        """Return the SHA-256 of every file of ``steps``: as recorded, and as computed now where the file is there."""
        records, digests = self.records(), {}
        for step in steps:
            for name, file in records[step]["files"].items():
                digests[name] = file["sha256"]
                path = self._work() / name
                if path.is_file() and sha256(path) != file["sha256"]:
                    raise SystemExit(f"{path} is not what its record says.")
        return digests


def points(count: int, blocks: int, seed: int) -> list[Kill]:
    """Return ``count`` random points of the first ``blocks`` in the order of the blocks, some in each."""
    chance = random.Random(seed)
    spread = sorted([*range(min(blocks, count)), *(chance.randrange(blocks) for _ in range(count - blocks))])
    return [Kill(block, chance.random(), index % _WRITING == _WRITING - 1) for index, block in enumerate(spread)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    arguments: list[object] = [options.checkpoint, "--threads", options.threads]
    arguments += ["--recipe", options.recipe] if options.recipe else []
    steps = [EMBEDDING, *(block_step(index) for index in range(options.blocks))]
    plain = Walk(options.folder / "undisturbed", arguments)
    undisturbed = plain.until(steps[-1])
    times = {step: plain.seen[step] - plain.seen[before] for before, step in itertools.pairwise(steps)}
    expected = plain.digests(steps)
    shutil.rmtree(plain.folder)
    print(f"undisturbed: {', '.join(f'{step} {seconds:.1f} s' for step, seconds in times.items())}", flush=True)
    walk = Walk(options.folder / "killed", arguments)
    killed = []
    for kill in points(options.kills, options.blocks, options.seed):
        after, done = walk.killed_at(kill, times[block_step(kill.block)])
        where = "while its files were written" if kill.writing else f"after {after:.1f} s"
        killed.append({**vars(kill), "after_s": None if kill.writing else after, "committed": done})
        print(
            f"killed in {block_step(kill.block)} {where}{', which was committed by then' if done else ''}", flush=True
        )
    if steps[-1] not in walk.records():
        walk.until(steps[-1])
    found = walk.digests(steps)
    same = found == expected
    print(
        f"{len(expected)} files of {len(steps)} steps after {len(killed)} kills: {'identical' if same else 'DIFFERENT'}"
    )
    if options.output:
        document = {
            "command": "python -m benchmarks.kills",
            "checkpoint": options.checkpoint.name,
            "recipe": options.recipe,
            "processor": machine.processor_name(),
            "threads": options.threads,
            "versions": machine.library_versions(),
            "seconds": times,
            "undisturbed_peak_bytes": undisturbed.peak_bytes,
            "kills": killed,
            "files": len(expected),
            "identical": same,
        }
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(walk.folder)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
