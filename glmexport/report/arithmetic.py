"""The arithmetic of the original in words."""

from __future__ import annotations

from collections.abc import Callable

from glmexport.report import text
from glmexport.results.arithmetic import OriginalArithmetic


def told_arithmetic(arithmetic: OriginalArithmetic | None) -> str:
    """Return the route of the original's products, and what its check found, for a report."""
    if arithmetic is None:
        return "not noted"
    return _told(arithmetic, text.ratio, text.number)


def brief_arithmetic(arithmetic: OriginalArithmetic) -> str:
    """Return the same for a terminal."""
    return _told(arithmetic, text.brief_ratio, lambda error: f"{error:.1e}")


def _told(
    arithmetic: OriginalArithmetic, ratio: Callable[[float], str], number: Callable[[float], str]
) -> str:
    parts = [f"fp32 products by {arithmetic.library}"]
    if arithmetic.speed_ratio is not None:
        parts.append(f"at least {ratio(arithmetic.speed_ratio)} as fast as torch's default")
    if arithmetic.relative_error is not None:
        parts.append(f"relative error {number(arithmetic.relative_error)}")
    if arithmetic.coarse_ratio is not None:
        parts.append(f"calibration in bf16, at least {ratio(arithmetic.coarse_ratio)} as fast as that")
    if arithmetic.moments_ratio is not None:
        parts.append(f"Hessians of inputs in bf16, at least {ratio(arithmetic.moments_ratio)} as fast")
    return ", ".join(parts)
