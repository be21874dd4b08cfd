"""Recipes say how to quantize. One is a TOML file under ``calibration/recipes``, or a file of the user's."""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from glmexport.foundation.definition import Definition, parse_table
from glmexport.foundation.inheritance import open_source

RECIPES = "calibration/recipes"
#: The meaning of codes: evenly spaced numbers, or the sixteen levels of NF4.
CodecName = Literal["affine", "nf4"]
#: The recipe of a checkpoint that is quantized already.
STORED = "stored"


class Format(Definition):
    """The format that one matrix is stored in: ``bits`` per code, one scale (and zero point) per ``group_size`` inputs.

    Asymmetric groups store a zero point of ``bits`` bits. Symmetric ones use the fixed zero point
    ``2 ** (bits - 1)`` and a signed scale, so that the full range of codes is in use.
    """

    bits: Literal[2, 4, 8]
    group_size: Literal[16, 32, 64, 128, 256]
    symmetric: bool = False
    #: ``nf4`` has 4 bits and no zero points. Left out where it is the usual one, as in bundles of before.
    codec: CodecName = Field(default="affine", exclude_if=lambda value: value == "affine")

    @model_validator(mode="after")
    def _is_what_the_codec_stores(self) -> Self:
        if self.codec == "nf4" and (self.bits != 4 or self.symmetric):
            raise ValueError("codec nf4 has bits = 4, and no symmetric form")
        return self

    @property
    def has_zero_points(self) -> bool:
        """Whether a zero point is stored for every group."""
        return self.codec == "affine" and not self.symmetric

    @property
    def label(self) -> str:
        """The short name, for example ``w4g32``, ``w4g128-sym`` or ``nf4g64``."""
        if self.codec != "affine":
            return f"{self.codec}g{self.group_size}"
        return f"w{self.bits}g{self.group_size}{'-sym' if self.symmetric else ''}"


class Solver(Definition):
    """Settings of the solver that finds codes and scales."""

    #: ``stored`` keeps the codes of a quantized checkpoint's linears; what it has in full precision stays so.
    method: Literal["gptq", "round-to-nearest", "stored"] = "gptq"
    #: Fraction of the Hessian's mean diagonal that is added to its diagonal before factorising.
    damping: float = Field(default=0.01, gt=0, le=1)
    #: ``group``: whole groups by importance, then columns inside each (GAR); ``stored``: as in the checkpoint.
    order: Literal["group", "stored"] = "group"
    #: Search scale and zero point of every group against the Hessian-weighted error; false takes min-max.
    scale_search: bool = True
    #: Move powers of two from the columns of linears into what writes their input, where rounding then costs less.
    fold_scales: bool = True
    #: Fit matrices to the original's outputs, so that each takes back part of the error of those before it; false
    #: fits them to their own outputs on the quantized stream.
    asymmetric: bool = True
    #: Rounds of coordinate descent over the codes followed by a closed-form refit of the scales.
    polish_rounds: int = Field(default=2, ge=0, le=16)
    #: Rounds for routed experts. A large mixture has tens of thousands of matrices, and rounds are most of the time.
    expert_polish_rounds: int = Field(default=0, ge=0, le=16)


class CalibrationPlan(Definition):
    """Settings of the calibration text: how much of each language the Hessians are measured on."""

    tokens: int = Field(ge=1024)
    sequence_length: int = Field(ge=64)
    #: Share of the tokens per language (BCP-47); shares are normalised to one. User text is the language ``user``.
    quota: dict[str, float]

    @field_validator("quota")
    @classmethod
    def _positive(cls, quota: dict[str, float]) -> dict[str, float]:
        if not quota or any(share <= 0 for share in quota.values()):
            raise ValueError("every share must be above 0")
        return quota


class Budget(Definition):
    """A bound of a bundle's size, and the formats to choose among, matrix by matrix, to lose least within it.

    Exactly one of ``bits_per_weight`` (over every weight, scales and zero points included) and ``bundle_bytes``
    (weights and rotary tables) is given.
    """

    bits_per_weight: float | None = Field(default=None, gt=0)
    bundle_bytes: int | None = Field(default=None, gt=0)
    candidates: tuple[Format, ...] = (
        Format(bits=2, group_size=32),
        Format(bits=2, group_size=64),
        Format(bits=4, group_size=128),
        Format(bits=4, group_size=64),
        Format(bits=4, group_size=32),
        Format(bits=8, group_size=128),
        Format(bits=8, group_size=32),
    )
    #: Held-out tokens on which every group of matrices is tried in every format.
    probe_tokens: int = Field(default=2048, ge=64)

    @property
    def label(self) -> str:
        """A short name, for example ``4.6bpw`` or ``5.2GiB``."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g}bpw"
        assert self.bundle_bytes is not None
        return f"{self.bundle_bytes / 2**30:.4g}GiB"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.bits_per_weight is None) == (self.bundle_bytes is None):
            raise ValueError("give either bits_per_weight or bundle_bytes")
        if len(set(self.candidates)) != len(self.candidates) or not self.candidates:
            raise ValueError("candidates: at least one, none twice")
        return self


class Recipe(Definition):
    """Settings of quantization: formats of the parts, the solver, and the calibration. None keeps full precision."""

    name: str
    summary: str
    linears: Format | None = None
    #: Format of what every token passes in mixtures of experts: attention, shared experts, dense layers. By default 8
    #: bits in the groups of ``linears``: little of the whole, and part of every answer.
    shared: Format | None = None
    lm_head: Format | None = None
    embedding: Format | None = None
    solver: Solver = Solver()
    calibration: CalibrationPlan | None = None
    #: Replaces the formats above, for the parts that have one, by what fits a budget best.
    budget: Budget | None = None

    @model_validator(mode="after")
    def _calibrates_if_it_solves(self) -> Self:
        if self.needs_calibration and self.calibration is None:
            raise ValueError("solver.method gptq needs a [calibration] table")
        if not self.needs_calibration and self.calibration is not None:
            raise ValueError("[calibration] is given, but nothing is solved against a Hessian")
        if self.budget is not None and not (self.needs_calibration and self.linears):
            raise ValueError("[budget] needs solver.method gptq and a format of the linears")
        return self

    def linear(self, *, mixture: bool, routed: bool) -> Format | None:
        """Return the format of a linear of the blocks, by whether it is in a mixture and whether all tokens pass it."""
        if self.linears is None or not mixture or routed:
            return self.linears
        return self.shared or self.linears.model_copy(update={"bits": 8, "codec": "affine"})

    @property
    def quantizes_linears(self) -> bool:
        """Whether any linear of the blocks is quantized, or kept as it is stored quantized."""
        return self.linears is not None or self.keeps_stored

    @property
    def keeps_stored(self) -> bool:
        """Whether the linears are taken as a quantized checkpoint stores them."""
        return self.solver.method == "stored"

    @property
    def needs_calibration(self) -> bool:
        """Whether any matrix is solved against a Hessian."""
        return self.solver.method == "gptq" and (self.linears is not None or self.lm_head is not None)

    def digest(self) -> str:
        """Return the SHA-256 of the recipe's values, so that two spellings of the same recipe are the same."""
        return "sha256:" + hashlib.sha256(self.model_dump_json(exclude={"summary"}).encode()).hexdigest()


def open_recipe(name_or_path: str) -> Recipe:
    """Return the shipped recipe of that name, or the one in that ``.toml`` file, with what it inherits.

    Raises:
        DefinitionError: unknown name, unknown key, a value out of range, or a recipe that cannot be extended.
    """
    source = open_source("recipe", RECIPES, name_or_path)
    return parse_table(source, {**source.resolved, "name": source.path.stem}, Recipe)
