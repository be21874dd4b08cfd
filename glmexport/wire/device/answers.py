"""The answers of a device: parts of the logits of texts, greedy tokens, their speed, and the placement of nodes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmexport.engine.core.graphs import FixedGraph, MaskedGraph
from glmexport.engine.core.greedy import greedy
from glmexport.engine.core.profile import GENERATED, PROMPT, profiled_nodes
from glmexport.engine.core.sequence import Engine
from glmexport.wire.device.facts import memory_bandwidth, peak_memory
from glmexport.wire.device.graphs import JobGraphs
from glmexport.wire.standalone import Tell

#: Number of rows whose logarithms are taken together, in fp64.
_ROWS = 64


def answer_text(
    scorer: MaskedGraph | FixedGraph, questions: Mapping[str, NDArray[np.int32]], index: int, prefix: int
) -> dict[str, NDArray[Any]]:
    """Return what is kept of text ``index`` of the ``questions``, of which the first ``prefix`` tokens are given."""
    logits = scorer.scores(questions[f"text.{index}.ids"].astype(np.int64))[prefix - 1 : -1]
    tokens, targets = (questions[f"text.{index}.{name}"] for name in ("tokens", "targets"))
    return text_answer(logits, tokens, targets, questions.get(f"text.{index}.audit"))


def text_answer(
    logits: NDArray[np.float32],
    tokens: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    audit: NDArray[np.integer[Any]] | None,
) -> dict[str, NDArray[Any]]:
    """Return what is kept of logits [positions, vocabulary] fp32.

    These are the logits of ``tokens`` [positions, k], of ``targets`` [positions], of all tokens at the positions
    ``audit``, and the logsumexp of all that are not among ``tokens``.
    """
    tokens = tokens.astype(np.int64)
    others = np.full(len(logits), -math.inf, np.float32)
    if tokens.shape[1] < logits.shape[1]:
        for start in range(0, len(logits), _ROWS):
            rows = logits[start : start + _ROWS].astype(np.float64)
            np.put_along_axis(rows, tokens[start : start + _ROWS], -math.inf, 1)
            most = rows.max(1)
            others[start : start + _ROWS] = most + np.log(np.exp(rows - most[:, None]).sum(1))
    kept = {
        "logits": np.take_along_axis(logits, tokens, 1),
        "log_others": others,
        "target": np.take_along_axis(logits, targets.astype(np.int64)[:, None], 1)[:, 0],
        "top": logits.argmax(1).astype(np.int32),
    }
    return kept if audit is None else {**kept, "audit": logits[audit]}


def answer_tokens(engine: Engine, prompt: Sequence[int], most: int) -> NDArray[np.int32]:
    """Return the greedy tokens [n] after ``prompt`` until an end token, which is the last, or ``most``."""
    tokens = []
    with closing(greedy(engine, prompt, fitting(engine, prompt, most))) as answer:
        for token in answer:
            tokens.append(token)
            if token in engine.ends:
                break
    return np.asarray(tokens, np.int32)


def fitting(engine: Engine, prompt: Sequence[int], most: int) -> int:
    """Return how many tokens the context has room for after ``prompt``, at most ``most``."""
    return min(most, engine.context_length - len(prompt))


def measure_speed(graphs: JobGraphs, asked: dict[str, Any], threads: int, tell: Tell) -> dict[str, Any]:
    """Time rounds in a process that has done nothing before but check files, so that its peak memory is theirs."""
    began = time.perf_counter()
    engine = graphs.engine()
    load = time.perf_counter() - began
    rounds: list[dict[str, Any]] = []

    def generate() -> dict[str, Any]:
        last, times = time.perf_counter(), []
        # No end token ends it earlier.
        for _ in greedy(engine, asked["prompt"], fitting(engine, asked["prompt"], asked["generated_tokens"])):
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return {"ttft_s": times[0], "steps_s": times[1:]}

    generate()
    begun = time.monotonic()
    while len(rounds) < asked["rounds"] or time.monotonic() - begun < asked["seconds"]:
        rounds.append(generate())
        tell({"event": "round", "index": len(rounds)})
    used, source = peak_memory()
    return {
        "threads": threads,
        "load_s": load,
        "rounds": rounds,
        "peak_memory_bytes": used,
        "peak_memory_source": source,
        "memory_bandwidth_bytes_per_s": memory_bandwidth(threads),
    }


def placed_nodes(graphs: JobGraphs, prompt: Sequence[int], results: Path) -> list[dict[str, Any]]:
    """Return which provider ran which node of the graphs for answers, from ONNX Runtime's profiles of a few tokens."""
    engine = graphs.engine(results / "profile")
    start = prompt[:PROMPT]
    for _ in greedy(engine, start, fitting(engine, start, GENERATED)):
        pass
    engine.close()
    nodes = []
    for profile in sorted(results.glob("profile*.json")):
        nodes += profiled_nodes(json.loads(profile.read_text("utf-8")))
        profile.unlink()
    return nodes
