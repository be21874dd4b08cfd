"""What every runtime's script shares: it loads a model, and then does what each line of its standard input says.

Imported by scripts that other environments run, so it needs numpy alone. One line of JSON a command, one an answer:

    {"do": "start", "tokens": N}     empty the cache and read a prompt of N tokens    -> {"seconds": [...]}
    {"do": "extend", "tokens": N}    read N more                                      -> {"seconds": [...]}
    {"do": "steps", "tokens": N}     decode N tokens one by one, after one uncounted  -> {"seconds": [...]}

The first answer, without a command, is {"runtime": ..., "load_s": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Protocol

import numpy as np


class Runtime(Protocol):
    """A loaded model and one sequence."""

    #: With version.
    name: str

    def start(self, ids: list[int]) -> None:
        """Forget the sequence and read ``ids``, until what follows them is known."""

    def extend(self, ids: list[int]) -> None:
        """Read ``ids`` behind what is cached."""

    def step(self) -> None:
        """Take the likeliest token and read it."""


def prompt(tokens: int, vocabulary: int, seed: int) -> list[int]:
    """The same token ids for every runtime."""
    ids: list[int] = np.random.default_rng(seed).integers(0, vocabulary, tokens).tolist()
    return ids


def serve(load: type[Runtime], *arguments: object, vocabulary: int) -> None:
    """Load and answer until there are no more commands."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    started = time.perf_counter()
    runtime = load(*arguments)
    reply(runtime=runtime.name, load_s=time.perf_counter() - started)
    for seed, line in enumerate(sys.stdin):
        command = json.loads(line)
        count = int(command["tokens"])
        ids = prompt(count, vocabulary, seed)
        seconds = []
        if command["do"] == "steps":
            # Some have the first token already when they have read the prompt.
            runtime.step()
        for _ in range(count if command["do"] == "steps" else 1):
            before = time.perf_counter()
            match command["do"]:
                case "start":
                    runtime.start(ids)
                case "extend":
                    runtime.extend(ids)
                case "steps":
                    runtime.step()
                case other:
                    raise ValueError(f"no such command: {other!r}")
            seconds.append(time.perf_counter() - before)
        reply(seconds=seconds)
