"""Seconds and operations of every stage of a build, by wrapping the functions that the stages consist of.

Stages nest: what is spent inside of another stage counts there alone. Whatever no stage claims is ``other``.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

OTHER = "other"
#: The functions of each stage: module, and name in it.
QUANTIZATION = {
    "folding": [("glmexport.quantization.decisions", "choose_folds")],
    "reading": [("glmexport.checkpoint.checkpoint:Checkpoint", name) for name in ("read", "rows", "codes")],
    "streams": [
        *(("glmexport.quantization.streams:Passage", name) for name in ("measure", "move_on", "outputs")),
        ("glmexport.quantization.streams:Streams", "measure_head"),
        ("glmexport.quantization.streams:Streams", "embedded"),
        *(("glmexport.quantization.mixture:Mixture", name) for name in ("__init__", "measure", "add", "outputs")),
    ],
    "Hessians": [("glmexport.calibration.hessian:Hessian", name) for name in ("add", "matrix")],
    "factorization": [("glmexport.quantization.problem:Problem", "prepare")],
    "goal": [
        ("glmexport.calibration.hessian:SecondMoment", "add"),
        ("glmexport.quantization.moments:Moments", "result"),
        ("glmexport.quantization.problem:Problem", "correction"),
        ("glmexport.quantization.solve", "_aim"),
    ],
    "sweep": [("glmexport.quantization.solve", "round_columns")],
    "polish": [("glmexport.quantization.solve", "polish")],
    "comparison": [
        ("glmexport.quantization.quantizer", "solve_rows"),
        ("glmexport.quantization.quantizer", "join_rows"),
        ("glmexport.quantization.quantizer", "nearest_without_text"),
    ],
    "write": [
        ("glmexport.quantization.store:WorkDirectory", "commit"),
        ("glmexport.quantization.store:Activations", "write"),
        ("glmexport.workflows.build", "write_bundle"),
    ],
    "hash": [
        ("glmexport.checkpoint.checkpoint", "files_digest"),
        ("glmexport.formats.quantized_linear:QuantizedLinear", "digest"),
    ],
}
VALIDATION = {
    "whole model": [("glmexport.validation.run", "check_reference")],
    "fidelity": [("glmexport.validation.shared_texts:SharedTexts", "divergences")],
    "noise floor": [("glmexport.validation.shared_texts:SharedTexts", "noise")],
    "shares": [("glmexport.validation.run", "shares_of")],
    "answers": [("glmexport.validation.run", "ask")],
    "weights": [("glmexport.validation.run", "check_weights")],
    "performance": [("glmexport.validation.run", "measure_performance")],
}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of q k^T and p v, of shapes [batch, heads, positions, size]."""
    batch, heads, positions, size = query
    return 2 * batch * heads * positions * key[2] * (size + value[3])


def _product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Operations of adding a product [n, m] of [n, k] and [k, m] to a matrix."""
    return 2 * left[0] * left[1] * right[1]


def _factorization(matrix: Any, *_: Any, **__: Any) -> float:
    return matrix[0] ** 3 / 3


def _solved_twice(right: Any, factor: Any, *_: Any, **__: Any) -> int:
    return 2 * factor[0] ** 2 * right[1]


def _solved(factor: Any, right: Any, *_: Any, **__: Any) -> int:
    return factor[0] ** 2 * right[1]


#: What torch does not count: products that are added in place, the processor's attention, and triangular factors.
_UNCOUNTED = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.linalg_cholesky_ex: _factorization,
    torch.ops.aten.cholesky_solve: _solved_twice,
    torch.ops.aten.linalg_solve_triangular: _solved,
}


class Stages:
    """What runs while it is ``watching``: seconds of all threads, seconds of wall time, and operations of products."""

    def __init__(self) -> None:
        self.processor: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self._open = [OTHER]
        self._since = (0.0, 0.0, 0.0)
        self._counter: FlopCounterMode | None = None

    @contextlib.contextmanager
    def watching(self, stages: dict[str, list[tuple[str, str]]], *, count: bool = False) -> Iterator[Stages]:
        """Wrap the functions of ``stages`` meanwhile; with ``count`` operations are counted too, which takes time."""
        with contextlib.ExitStack() as stack:
            for stage, functions in stages.items():
                for place, name in functions:
                    stack.enter_context(self._wrapped(stage, place, name))
            if count:
                self._counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
                stack.enter_context(self._counter)
            self._since = self._now()
            yield self
            self._claim()

    @contextlib.contextmanager
    def _wrapped(self, stage: str, place: str, name: str) -> Iterator[None]:
        module, _, kind = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, kind) if kind else owner
        plain = vars(owner)[name]
        function = plain.__func__ if isinstance(plain, classmethod) else plain

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self._inside(stage):
                result = function(*arguments, **named)
            return self._watched(stage, result)

        setattr(owner, name, classmethod(timed) if isinstance(plain, classmethod) else timed)
        try:
            yield
        finally:
            setattr(owner, name, plain)

    def _watched(self, stage: str, result: Any) -> Any:
        """What is computed as it is read belongs to the stage that returned it."""
        if isinstance(result, dict):
            return {key: self._watched(stage, value) for key, value in result.items()}
        return self._read(stage, result) if isinstance(result, Iterator) else result

    def _read(self, stage: str, values: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._inside(stage):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    @contextlib.contextmanager
    def _inside(self, stage: str) -> Iterator[None]:
        # Validation's stages are whole: what they share with a walk is theirs.
        stage = self._open[-1] if self._open[-1] in VALIDATION else stage
        self._claim()
        self._open.append(stage)
        try:
            yield
        finally:
            self._claim()
            self._open.pop()

    def _claim(self) -> None:
        now = self._now()
        for total, ended, began in zip((self.processor, self.wall, self.operations), now, self._since, strict=True):
            total[self._open[-1]] += ended - began
        self._since = now

    def _now(self) -> tuple[float, float, float]:
        operations = float(self._counter.get_total_flops()) if self._counter else 0.0
        return time.process_time(), time.perf_counter(), operations
