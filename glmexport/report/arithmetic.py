"""The arithmetic of the original in words."""

from __future__ import annotations

from glmexport.report import text
from glmexport.results.arithmetic import OriginalArithmetic


def told_arithmetic(arithmetic: OriginalArithmetic | None) -> str:
    """Return the route of the original's products, and what its check found, for a report."""
    if arithmetic is None:
        return "not noted"
    parts = [f"fp32 products of matrices by {arithmetic.library}"]
    if arithmetic.speed_ratio is not None:
        parts.append(f"at least {text.ratio(arithmetic.speed_ratio)} the speed of torch’s default")
    if arithmetic.relative_error is not None:
        parts.append(f"relative error {text.number(arithmetic.relative_error)}")
    if arithmetic.coarse_ratio is not None:
        parts.append(f"calibration in bf16, at least {text.ratio(arithmetic.coarse_ratio)} the speed of that")
    if arithmetic.moments_ratio is not None:
        parts.append(f"Hessians of inputs in bf16, at least {text.ratio(arithmetic.moments_ratio)} the speed")
    return ", ".join(parts)


def brief_arithmetic(arithmetic: OriginalArithmetic) -> str:
    """Return the same for a terminal."""
    parts = [f"fp32 products by {arithmetic.library}"]
    if arithmetic.speed_ratio is not None:
        parts.append(f"at least {text.brief_ratio(arithmetic.speed_ratio)} as fast as torch's default")
    if arithmetic.relative_error is not None:
        parts.append(f"relative error {arithmetic.relative_error:.1e}")
    if arithmetic.coarse_ratio is not None:
        parts.append(f"calibration in bf16, at least {text.brief_ratio(arithmetic.coarse_ratio)} as fast as that")
    if arithmetic.moments_ratio is not None:
        parts.append(f"Hessians of inputs in bf16, at least {text.brief_ratio(arithmetic.moments_ratio)} as fast")
    return ", ".join(parts)
