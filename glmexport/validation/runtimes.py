"""One runtime in a process of its own: it loads, warms up, and then generates each time it is told to.

It has a process of its own, because peak memory is a property of a process and because two runtimes in one would share
thread pools and caches. ``python -m glmexport.validation.runtimes REQUEST`` answers each line of its standard input
(``generate``, ``generate N``, ``memory``, ``place``) by one line of JSON, and ends with its input.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.greedy import greedy
from glmexport.engine.opening import open_engine
from glmexport.engine.placement import Node, profile
from glmexport.foundation.definition import Definition
from glmexport.foundation.machine import peak_memory_and_source
from glmexport.validation.energy import Rapl, open_rapl

RuntimeName = Literal["onnxruntime-genai", "transformers"]


class RuntimeRequest(Definition):
    """A runtime to load, and what it generates; ``prompt`` are fixed token ids, the same for every runtime."""

    runtime: RuntimeName
    directory: str
    prompt: tuple[int, ...]
    generated_tokens: int
    threads: int


class Loaded(Definition):
    """The first answer, after loading and one generation that nobody counts."""

    runtime: str
    load_s: float


class Round(Definition):
    """The measurements of one generation."""

    #: Seconds from the prompt's token ids to the first token.
    ttft_s: float
    #: Seconds of each further token.
    steps_s: tuple[float, ...]
    #: Energy in J of the further tokens; None where the machine does not tell.
    decode_j: float | None


class Memory(Definition):
    """Peak memory so far, or None; where the figure comes from, or why there is none; and why energy is unknown."""

    bytes: int | None
    source: str
    energy_absent_because: str | None


class Nodes(Definition):
    """The execution providers that the nodes of the graph ran on."""

    nodes: tuple[Node, ...]


class _Runtime(Protocol):
    name: str

    def generate(self, prompt_tokens: int | None = None) -> Iterator[None]:
        """Yield after each token; the first step is the prefill, of the first ``prompt_tokens`` if they are given."""
        ...


class _Bundle:
    """A bundle in the engine that serves it."""

    def __init__(self, request: RuntimeRequest) -> None:
        self._engine = open_engine(Bundle.open(Path(request.directory)), request.threads)
        self.name = self._engine.label
        self._prompt = request.prompt
        self._tokens = request.generated_tokens

    def generate(self, prompt_tokens: int | None = None) -> Iterator[None]:
        # No end token ends it earlier.
        for _ in greedy(self._engine, self._prompt[:prompt_tokens], self._tokens):
            yield


class _Transformers:
    def __init__(self, request: RuntimeRequest) -> None:
        import torch
        import transformers

        torch.set_num_threads(request.threads)
        transformers.utils.logging.disable_progress_bar()
        self.name = f"transformers {transformers.__version__}, fp32"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            request.directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
        self._prompt = torch.tensor([request.prompt])
        self._tokens = request.generated_tokens

    def generate(self, prompt_tokens: int | None = None) -> Iterator[None]:
        import torch

        ids, cache = self._prompt[:, :prompt_tokens], None
        for _ in range(self._tokens):
            with torch.inference_mode():
                output: Any = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            yield


def _opened(request: RuntimeRequest) -> _Runtime:
    if request.runtime == "transformers":
        return _Transformers(request)
    return _Bundle(request)


def serve(request: RuntimeRequest, commands: TextIO, replies: TextIO) -> None:
    """Answer ``commands`` until there are no more."""

    def reply(answer: Definition) -> None:
        replies.write(answer.model_dump_json() + "\n")
        replies.flush()

    started = time.perf_counter()
    model = _opened(request)
    load = time.perf_counter() - started
    energy = open_rapl()
    counters = energy if isinstance(energy, Rapl) else None
    _time(model, counters)
    reply(Loaded(runtime=model.name, load_s=load))
    for command in commands:
        match command.split():
            case ["generate"]:
                reply(_time(model, counters))
            case ["generate", tokens]:
                reply(_time(model, counters, int(tokens)))
            case ["memory"]:
                used, source = peak_memory_and_source()
                reply(Memory(bytes=used, source=source, energy_absent_because=None if counters else str(energy)))
            case ["place"]:
                # Two models are never in memory at a time; nothing can be generated after this.
                del model
                gc.collect()
                reply(Nodes(nodes=profile(Bundle.open(Path(request.directory)), request.prompt, request.threads)))
            case _:
                raise ValueError(f"no such command: {command!r}")


def _time(runtime: _Runtime, energy: Rapl | None, prompt_tokens: int | None = None) -> Round:
    started = time.perf_counter()
    steps = runtime.generate(prompt_tokens)
    next(steps)
    first = time.perf_counter() - started
    before = energy.read() if energy else ()
    last = time.perf_counter()
    times = []
    for _ in steps:
        now = time.perf_counter()
        times.append(now - last)
        last = now
    joules = energy.joules(before, energy.read()) if energy else None
    return Round(ttft_s=first, steps_s=tuple(times), decode_j=joules)


if __name__ == "__main__":
    # Output that libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(RuntimeRequest.model_validate_json(sys.argv[1]), sys.stdin, answers)
