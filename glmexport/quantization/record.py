"""How each matrix was quantized: written down by the walk, kept in the bundle's manifest, shown in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable

from glmexport.architecture import Linear
from glmexport.architecture.experts import EXPERT_INPUT
from glmexport.definition import Definition
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.problem import LEAST_TOKENS
from glmexport.quantization.solve import Solution
from glmexport.recipe import Format


class QuantizedMatrix(Definition):
    """How one matrix was quantized. None: not measured.

    Errors are relative to the matrix's output on the calibration inputs; that of round-to-nearest is with the recipe's
    search for scales. ``shrinkage`` is the mean share of the asymmetric target's correction that held-out text
    confirmed, ``unpolished_rows`` the rows whose polish it did not, ``nearest_rows`` those that are rounded to nearest
    because that serves it better, or because the whole matrix fell back to it.
    """

    key: str
    #: None for the embedding and the lm_head.
    layer: int | None
    part: str
    bits: int
    group_size: int
    symmetric: bool
    bits_per_weight: float
    #: ``QuantizedLinear.digest`` of what was decided on; None in bundles of before it was recorded.
    digest: str | None = None
    relative_error: float | None = None
    round_to_nearest_error: float | None = None
    damping: float | None = None
    dead_columns: int = 0
    #: Whether fp32 was not precise enough to factor the Hessian, and fp64 did it; nothing is lost by that.
    double: bool = False
    effective_tokens_per_column: float | None = None
    #: Calibration positions whose router chose it; None: all pass it, or none were run.
    chosen: int | None = None
    shrinkage: float | None = None
    unpolished_rows: int = 0
    #: Powers of two were moved between its columns and what writes its input.
    folded: bool = False
    nearest_rows: int = 0
    #: Why the solver could not do what the recipe asks for; None if it did.
    fallback: str | None = None

    @classmethod
    def unmeasured(cls, key: str, layer: int | None, part: str, linear: QuantizedLinear) -> QuantizedMatrix:
        """Of a matrix that no text was run through."""
        form = linear.form
        return cls(
            key=key,
            layer=layer,
            part=part,
            bits=form.bits,
            group_size=form.group_size,
            symmetric=form.symmetric,
            bits_per_weight=linear.bits_per_weight,
            digest=linear.digest(),
        )

    @classmethod
    def solved(
        cls, linear: Linear, layer: int | None, solution: Solution, effective_tokens: float, *, folded: bool
    ) -> QuantizedMatrix:
        """Of a matrix solved against a Hessian of so many effective tokens."""
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
        return cls.unmeasured(linear.weight, layer, linear.part, solution.linear).model_copy(update=measured)


    def routed(self, linear: Linear, chosen: int | None, own_tokens: float) -> QuantizedMatrix:
        """The same, of an expert that ``chosen`` positions passed, worth so many different ones."""
        return self.model_copy(
            update={"chosen": chosen, "effective_tokens_per_column": own_tokens / linear.in_features}
        )


class ExpertCoverage(Definition):
    """How the calibration text spread over the routed experts of one layer, by the quantized model's own router."""

    layer: int
    #: Positions that chose each expert, in order; those that no Hessian sees are left out.
    tokens: tuple[int, ...]
    #: Experts whose positions alone would be too few to fit anything to: worth less than ``LEAST_TOKENS`` a column.
    cold: tuple[int, ...]


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


class AllocatedGroup(Definition):
    """Matrices that were given one format together under a budget, and what that costs."""

    name: str
    keys: tuple[str, ...]
    format: Format
    #: Bits that all its matrices are stored in.
    bits: int
    #: Mean KL divergence that the group causes alone in that format, rounded to nearest, everything else original.
    loss_nats: float
    #: False: the loss follows from that of another group size (see ``TieGroup.tried``).
    tried: bool
