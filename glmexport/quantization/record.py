"""How each matrix was quantized: written down by the walk, kept in the bundle's manifest, shown in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable

from glmexport.architecture.description import Linear
from glmexport.architecture.experts import EXPERT_INPUT
from glmexport.bundle.records import ExpertCoverage, QuantizedMatrix
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.problem import LEAST_TOKENS
from glmexport.quantization.solve import Solution


def unmeasured(key: str, layer: int | None, part: str, linear: QuantizedLinear) -> QuantizedMatrix:
    """Return the record of a matrix that no text was run through."""
    form = linear.form
    return QuantizedMatrix(
        key=key,
        layer=layer,
        part=part,
        bits=form.bits,
        group_size=form.group_size,
        symmetric=form.symmetric,
        codec=form.codec,
        bits_per_weight=linear.bits_per_weight,
        dead_columns=0,
        effective_tokens_per_column=None,
        digest=linear.digest(),
    )


def solved_record(
    linear: Linear, layer: int | None, solution: Solution, effective_tokens: float, *, folded: bool
) -> QuantizedMatrix:
    """Return the record of a matrix solved against a Hessian of so many effective tokens."""
    failed = math.isnan(solution.relative_error)
    measured = {
        "relative_error": None if failed else solution.relative_error,
        "round_to_nearest_error": None if failed else solution.round_to_nearest_error,
        "damping": None if failed else solution.damping,
        "dead_columns": solution.dead_columns,
        "double": solution.double,
        "effective_tokens_per_column": effective_tokens / linear.in_features,
        "shrinkage": solution.shrinkage,
        "unpolished_rows": solution.unpolished_rows,
        "folded": folded,
        "nearest_rows": solution.nearest_rows,
        "fallback": solution.fallback,
    }
    return unmeasured(linear.weight, layer, linear.part, solution.linear).model_copy(update=measured)


def routed(record: QuantizedMatrix, linear: Linear, chosen: int | None, own_tokens: float) -> QuantizedMatrix:
    """Return the record of an expert that ``chosen`` positions passed, worth so many different ones."""
    return record.model_copy(update={"chosen": chosen, "effective_tokens_per_column": own_tokens / linear.in_features})


def coverage(matrices: Iterable[QuantizedMatrix]) -> tuple[ExpertCoverage, ...]:
    """Of every layer with experts that were measured, from the records of their matrices in the order of the model."""
    layers: dict[int, list[QuantizedMatrix]] = {}
    for matrix in matrices:
        if matrix.chosen is not None and matrix.part == EXPERT_INPUT and matrix.layer is not None:
            layers.setdefault(matrix.layer, []).append(matrix)
    return tuple(
        ExpertCoverage(
            layer=layer,
            tokens=tuple(matrix.chosen or 0 for matrix in experts),
            cold=tuple(
                index
                for index, matrix in enumerate(experts)
                if (matrix.effective_tokens_per_column or 0.0) < LEAST_TOKENS
            ),
        )
        for layer, experts in layers.items()
    )


