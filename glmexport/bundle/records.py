"""The records of how each matrix was quantized: kept in the bundle's manifest, shown in the report."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from glmexport.foundation.definition import Count, Definition, Number
from glmexport.foundation.recipe import Format

#: The order of a matrix's values in the first manifests. A manifest's digest is over its values as they are written,
#: and signatures and reports name it: what was added since comes behind them.
_FIRST = (
    "key", "layer", "part", "bits", "group_size", "symmetric", "bits_per_weight", "digest", "relative_error",
    "round_to_nearest_error", "damping", "dead_columns", "double", "effective_tokens_per_column", "chosen", "shrinkage",
    "unpolished_rows", "folded", "nearest_rows", "fallback",
)  # fmt: skip


class MatrixRecord(Definition):
    """The facts about a quantized matrix that a bundle's manifest and its report both have, in the same words."""

    model_config = ConfigDict(use_attribute_docstrings=True, ser_json_inf_nan="strings")

    layer: int | None
    """Decoder block, from 0; none for the embedding and the language-model head."""
    part: str
    """Part of the model: qkv, o, gate_up, down, lm_head or embedding."""
    bits: Annotated[int, Field(ge=1, le=32)]
    group_size: int
    """Weights that share one scale."""
    symmetric: bool
    codec: str = Field(default="affine", exclude_if=lambda value: value == "affine")
    """The meaning of a code: a whole number of steps from a zero point (affine), or a level of a table (nf4)."""
    bits_per_weight: Number
    dead_columns: Count
    """Input columns that are zero on all calibration inputs."""
    double: bool = False
    """Whether the Hessian had to be factored in fp64; nothing is lost by that."""
    effective_tokens_per_column: Number | None
    """Calibration tokens that an input column effectively rests on, repeated text once; none if not measured."""
    shrinkage: Number | None = None
    """Mean share of the asymmetric target's correction that held-out text confirmed; none without one."""
    unpolished_rows: Count = 0
    """Rows whose polish made held-out text worse and was taken back."""
    folded: bool = False
    """Whether powers of two were moved between its columns and what writes its input, which is exact."""
    nearest_rows: Count = 0
    """Rows rounded to nearest with the same search, as that serves them better or the whole matrix fell back."""

    def shared(self) -> dict[str, Any]:
        """Return the values of these fields by their names."""
        return {name: getattr(self, name) for name in MatrixRecord.model_fields}


class QuantizedMatrix(MatrixRecord):
    """The record of how one matrix was quantized; None: not measured.

    Errors are relative to the matrix's output on the calibration inputs; that of round-to-nearest is with the recipe's
    search for scales.
    """

    key: str
    #: The ``QuantizedLinear.digest`` of the chosen codes; None in bundles older than this field.
    digest: str | None = None
    relative_error: float | None = None
    round_to_nearest_error: float | None = None
    damping: float | None = None
    #: Number of calibration positions whose router chose it; None: all pass it, or none were run.
    chosen: int | None = None
    #: The reason why the solver could not do what the recipe asks for; None if it did.
    fallback: str | None = None

    @model_serializer(mode="wrap")
    def _in_the_first_order(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = values(self)
        return {name: written.pop(name) for name in _FIRST if name in written} | written


class ExpertCoverage(Definition):
    """The spread of the calibration text over the routed experts of one layer, by the quantized model's own router."""

    layer: int
    #: Number of positions that chose each expert, in order; those that no Hessian sees are left out.
    tokens: tuple[int, ...]
    #: Experts whose positions alone would be too few to fit anything to: worth less than ``LEAST_TOKENS`` a column.
    cold: tuple[int, ...]


class AllocatedGroup(Definition):
    """Matrices that were given one format together under a budget, and what that costs."""

    name: str
    keys: tuple[str, ...]
    format: Format
    #: Number of bits that all its matrices are stored in.
    bits: int
    #: Mean KL divergence that the group causes alone in that format, rounded to nearest, everything else original.
    loss_nats: float
    #: Whether the loss was measured, or follows from that of another group size (see ``TieGroup.tried``), or is the
    #: group's share in that of all routed experts of its layer (see ``expert_probe``).
    tried: bool
    #: The part of a routed expert that it is (``Linear.part``). Left out where it is none, as in bundles of before.
    expert_part: str | None = Field(default=None, exclude_if=lambda value: value is None)
    #: Whether hardly any of the text chose the expert, which counts as if more of it had.
    cold: bool = Field(default=False, exclude_if=lambda value: not value)


class StoredTensor(Definition):
    """The place of quantized matrices in a graph, one below the other, and their format."""

    #: The checkpoint keys of the matrices, in the order of their rows.
    matrices: tuple[str, ...]
    #: The format in which they are stored: zero points that are spelled out belong to it.
    format: Format
    #: The graph's tensors by what they hold: codes, scales and, where there are any, zero_points.
    parts: dict[Literal["codes", "scales", "zero_points"], str]
    #: The layout. ``packed``: as the format's codec packs them, rows along the first axis. ``columns``: codes are
    #: numbers [in, out], signed where there are no zero points, and the others [groups, out].
    layout: Literal["packed", "columns"] = "packed"

    @model_validator(mode="after")
    def _has_what_the_format_has(self) -> Self:
        expected = {"codes", "scales"} | ({"zero_points"} if self.format.has_zero_points else set())
        if set(self.parts) != expected:
            raise ValueError(f"parts: {self.format.label} is stored as {', '.join(sorted(expected))}")
        return self
