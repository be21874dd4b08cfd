"""The record of how products of fp32 matrices were computed for the original and the quantization."""

from __future__ import annotations

from glmexport.foundation.definition import Number
from glmexport.results.record import Record

#: The name of torch's default route, which every machine has.
FP32 = "fp32"
_LIBRARIES = {FP32: "torch's default", "onednn": "oneDNN"}


class OriginalArithmetic(Record):
    """The route by which products of fp32 matrices were computed, and what the check of it found on that machine."""

    route: str
    """Name of the route: fp32 is torch's default."""
    relative_error: Number | None = None
    """Largest relative error against fp64 of the products that the check tried; none where nothing was checked."""
    speed_ratio: Number | None = None
    """Least ratio of its speed to that of torch's default, of several turns; none for the default itself."""
    coarse_ratio: Number | None = None
    """Least ratio of the speed of bf16 products to that of the route, of several turns, where calibration text passes
    the blocks by them; none where it passes them in fp32."""
    moments_ratio: Number | None = None
    """Least ratio of the speed of Hessians and cross moments of inputs rounded to bf16 to that of others, of several
    turns; none where they are not rounded."""

    @property
    def coarse(self) -> bool:
        """Whether calibration text passes the blocks by products of bf16 matrices."""
        return self.coarse_ratio is not None

    @property
    def coarse_moments(self) -> bool:
        """Whether Hessians and cross moments are those of inputs rounded to bf16."""
        return self.moments_ratio is not None

    @property
    def fine(self) -> OriginalArithmetic:
        """The arithmetic by the same route with nothing of the calibration in bf16."""
        return self.model_copy(update={"coarse_ratio": None, "moments_ratio": None})

    @property
    def label(self) -> str:
        """The part that bytes depend on: the route, and what bf16 computes of the calibration."""
        parts = (self.route, "bf16" if self.coarse else "", "moments" if self.coarse_moments else "")
        return "+".join(filter(None, parts))

    @property
    def library(self) -> str:
        """The library that computes, for people."""
        return _LIBRARIES.get(self.route, self.route)


#: Torch's default, where nobody asked for a check.
UNCHECKED = OriginalArithmetic(route=FP32)
