"""Every way to compute products of fp32 matrices that was considered: speed beside torch's default, and error.

    python -m benchmarks.arithmetic [--threads N] [--turns N] [--size K ...] [--output FILE]

Ways take turns; a speed is that of a way's best turn, a ratio the median over the turns of the default's time to its
own. Errors are the largest of a row against fp64, relative to the row. A way is a route of the product, or was none:

    fp32        torch's default
    onednn      fp32 products that oneDNN may compute in bf16, which it does only where the processor has AMX
    two parts   onednn, the activations as a sum of two numbers that bf16 holds, as the weights are
    bf16        products of bf16 tensors, whose results are bf16
    rounded     moments of inputs rounded to bf16, by onednn: the time with the rounding, the error that of the product

Factorizations, and what is solved with them, are LAPACK's, whose time is the first of their ratio, or in blocks by
either route; their errors are those of the product of the factors, and of the matrix with the solution.

The last lines are the check that every command makes, and what it chooses here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from glmexport.foundation import machine
from glmexport.quantization.cholesky import cholesky, cholesky_solve
from glmexport.reference.arithmetic import DEFAULT, ONEDNN, Route
from glmexport.reference.arithmetic_check import LARGEST_ERROR, LEAST_RATIO, check, products

#: Rows and columns that are compared with fp64, evenly spread.
_COMPARED = 64
_TOKENS, _HIDDEN, _INNER, _SLAB, _GROUP = 512, 4096, 13_696, 192, 128


@dataclass(frozen=True)
class Shape:
    """A product as building GLM-4-9B has it."""

    name: str
    left: Tensor
    right: Tensor
    #: What it is added to, if anything.
    into: Tensor | None = None
    #: Whether the right one holds weights, which bf16 represents.
    weights: bool = False

    @property
    def operations(self) -> int:
        return 2 * self.left.numel() * self.right.shape[-1]

    def error(self, found: Tensor) -> float:
        rows, columns = (
            torch.linspace(0, size - 1, min(size, _COMPARED)).long() for size in (found.shape[-2], found.shape[-1])
        )
        exact = self.left[..., rows, :].double() @ self.right[..., columns].double()
        missed = torch.linalg.vector_norm(found[..., rows, :][..., columns].double() - exact, dim=-1)
        return float((missed / torch.linalg.vector_norm(exact, dim=-1)).max())


def shapes() -> list[Shape]:
    """The products that most of a build's time is in."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def weight(rows: int, columns: int) -> Tensor:
        return normal(rows, columns).bfloat16().float().T

    inputs, inner = normal(_TOKENS, _HIDDEN), normal(_TOKENS, _INNER)
    square = normal(_HIDDEN, _HIDDEN)
    return [
        Shape("o, 512 tokens", inputs, weight(_HIDDEN, _HIDDEN), weights=True),
        Shape("gate and up, 512 tokens", inputs, weight(2 * _INNER, _HIDDEN), weights=True),
        Shape("down, 512 tokens", inner, weight(_HIDDEN, _INNER), weights=True),
        Shape("o, 8 tokens", inputs[:8], weight(_HIDDEN, _HIDDEN), weights=True),
        Shape("o, 1 token", inputs[:1], weight(_HIDDEN, _HIDDEN), weights=True),
        Shape("Hessian, its last slab", inputs[:, -_SLAB:].T, inputs, torch.zeros(_SLAB, _HIDDEN)),
        Shape("Hessian of down, its last slab", inner[:, -_SLAB:].T, inner, torch.zeros(_SLAB, _INNER)),
        Shape("cross moment", inputs.T, normal(_TOKENS, _HIDDEN), torch.zeros(_HIDDEN, _HIDDEN)),
        Shape("scores of 32 heads", normal(32, _TOKENS, _GROUP), normal(32, _TOKENS, _GROUP).transpose(1, 2)),
        Shape("sweep, a group in the middle", square[: _HIDDEN // 2, :_GROUP].T, square[: _HIDDEN // 2]),
        Shape("held-out text times an error", normal(1024, _HIDDEN), square),
    ]


def in_fp32(shape: Shape) -> Tensor:
    if shape.into is None:
        return shape.left @ shape.right
    return shape.into.zero_().addmm_(shape.left, shape.right)


def in_two_parts(shape: Shape) -> Tensor:
    first = shape.left.bfloat16().float()
    second = (shape.left - first).bfloat16().float()
    return (first @ shape.right).addmm_(second, shape.right)


@dataclass(frozen=True)
class Way:
    """One way to compute a product, given the tensors in its own type."""

    name: str
    compute: Callable[[Shape], Tensor]
    route: Route = DEFAULT
    #: Whether it needs weights on the right.
    of_weights: bool = False
    #: Whether it is for moments, of inputs rounded to bf16.
    of_moments: bool = False
    dtype: torch.dtype = torch.float32


WAYS = (
    Way("fp32", in_fp32),
    Way("onednn", in_fp32, ONEDNN),
    Way("two parts", in_two_parts, ONEDNN, of_weights=True),
    Way("bf16", lambda shape: shape.left @ shape.right, of_weights=True, dtype=torch.bfloat16),
    Way("rounded", lambda shape: in_fp32(rounded(shape)), ONEDNN, of_moments=True),
)


def rounded(shape: Shape) -> Shape:
    return replace(shape, left=shape.left.bfloat16().float(), right=shape.right.bfloat16().float())


def measured(shape: Shape, turns: int) -> list[dict[str, Any]]:
    """A row for every way."""
    moments = shape.into is not None
    ways = [way for way in WAYS if way.of_weights <= shape.weights and way.of_moments <= moments]
    inputs = {
        way.name: replace(shape, left=shape.left.to(way.dtype), right=shape.right.to(way.dtype)) for way in ways
    }
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    errors = {}
    for turn in range(turns + 1):
        for way in ways:
            with way.route.computing(), torch.inference_mode():
                started = time.perf_counter()
                found = way.compute(inputs[way.name])
                taken = time.perf_counter() - started
            if turn:
                seconds[way.name].append(taken)
            else:
                errors[way.name] = (rounded(shape) if way.of_moments else shape).error(found)
    return [
        {
            "product": shape.name,
            "way": way.name,
            "gflops_per_s": shape.operations / min(seconds[way.name]) / 1e9,
            "ratio": median(a / b for a, b in zip(seconds["fp32"], seconds[way.name], strict=True)),
            "relative_error": errors[way.name],
        }
        for way in ways
    ]


def factored(size: int, turns: int) -> list[dict[str, Any]]:
    """A row for every way to factor a matrix of ``size``, and to solve 1,024 right sides with it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, size, generator=generator)
    matrix = (inputs.T @ inputs / size).add_(torch.eye(size), alpha=0.1)
    lower = torch.linalg.cholesky(matrix)
    right = torch.randn(size, 1024, generator=generator)
    some = torch.linspace(0, size - 1, _COMPARED).long()

    def missed(found: Tensor, exact: Tensor) -> float:
        return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))

    def factor_error(found: Tensor) -> float:
        return missed(found[some].double() @ found[some].double().T, matrix[some][:, some].double())

    def solution_error(found: Tensor) -> float:
        return missed(matrix[some].double() @ found.double(), right[some].double())

    kinds: dict[str, tuple[int, Callable[[], Tensor], Callable[[], Tensor | None], Callable[[Any], float]]] = {
        f"Cholesky of {size:,}": (
            size**3 // 3,
            lambda: torch.linalg.cholesky(matrix),
            lambda: cholesky(matrix),
            factor_error,
        ),
        f"1,024 solutions of {size:,}": (
            2 * size**2 * 1024,
            lambda: torch.cholesky_solve(right, lower),
            lambda: cholesky_solve(right, lower),
            solution_error,
        ),
    }
    rows = []
    for name, (operations, theirs, ours, error) in kinds.items():
        ways = {"LAPACK": (theirs, DEFAULT), "blocks, fp32": (ours, DEFAULT), "blocks, onednn": (ours, ONEDNN)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        errors = {}
        for _ in range(turns):
            for way, (compute, route) in ways.items():
                with route.computing(), torch.inference_mode():
                    started = time.perf_counter()
                    found = compute()
                    seconds[way].append(time.perf_counter() - started)
                errors[way] = error(found)
        rows += [
            {
                "product": name,
                "way": way,
                "gflops_per_s": operations / min(seconds[way]) / 1e9,
                "ratio": median(a / b for a, b in zip(seconds["LAPACK"], seconds[way], strict=True)),
                "relative_error": errors[way],
            }
            for way in ways
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--size", type=int, nargs="*", default=[_HIDDEN, _INNER], help="of matrices to factor")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("| product | way | GFLOP/s | ratio | relative error |\n|---|---|---:|---:|---:|")
    measurements = [partial(measured, shape, options.turns) for shape in shapes()]
    measurements += [partial(factored, size, options.turns) for size in options.size]
    for measurement in measurements:
        for row in measurement():
            rows.append(row)
            print(
                f"| {row['product']} | {row['way']} | {row['gflops_per_s']:.0f} | {row['ratio']:.2f} "
                f"| {row['relative_error']:.1e} |",
                flush=True,
            )
    started = time.perf_counter()
    found = check(ONEDNN, products())
    seconds = time.perf_counter() - started
    ratio = min(found.ratios, default=math.nan)
    chosen = "fp32" if found.refused else "onednn"
    print(
        f"\nThe check takes {seconds:.2f} s: onednn has a relative error of {found.relative_error:.1e} (at most "
        f"{LARGEST_ERROR:.0e}) and {ratio:.2f} of the default's speed in its worst turn (at least {LEAST_RATIO}). "
        f"Chosen: {chosen}{f', as {found.refused}' if found.refused else ''}."
    )
    if options.output:
        document = {
            "command": "python -m benchmarks.arithmetic",
            "processor": machine.processor_name(),
            "instruction_sets": machine.instruction_sets(),
            "threads": options.threads,
            "versions": machine.library_versions(),
            "rows": rows,
            "check": {
                "seconds": seconds,
                "relative_error": found.relative_error,
                "ratios": found.ratios,
                "refused": found.refused,
                "chosen": chosen,
            },
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
