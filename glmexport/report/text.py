"""Numbers and foreign text in a form that a reader can trust: units, few digits, and nothing invisible.

Reports have typeset numbers, to significant digits. What is ``brief`` is for a terminal: plain spaces, and so many
decimals that columns line up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from glmexport.foundation.untrusted import visible

if TYPE_CHECKING:
    from glmexport.results.gate import Gate

THIN = "\u202f"
"""Narrow no-break space, between thousands and before the percent sign."""
FIXED = "\u00a0"
"""No-break space, between a number and its unit."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_DIGITS = 12


def token(text: str) -> str:
    """Return a visible token, the spaces at either end as open boxes: "␣the" is another token than "the"."""
    if not text:
        return "(empty)"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    right = len(text) - left - len(inner)
    return "␣" * left + visible(inner) + "␣" * right


def number(value: float, digits: int = 3) -> str:
    """Return ``value`` to ``digits`` significant digits; integers of up to 15 digits in full, thousands apart."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "−∞" if value < 0 else "∞"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", THIN).replace("-", "−")
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 15:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}{THIN}×{THIN}{power_of_ten(int(power))}".replace("-", "−")
    # Rounding can carry into the next decade: 0.9999 is 1.00, not 1.000.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace(",", THIN).replace("-", "−")


def power_of_ten(exponent: int) -> str:
    """Return 10 with ``exponent`` raised above the line."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def ratio(value: float, digits: int = 3) -> str:
    """Return a factor in the form "3.14×"."""
    return f"{_measured(value, digits)}×"


def percent(fraction: float, digits: int = 3) -> str:
    """Return ``fraction`` (0 to 1) in percent; 100 % only if it is exactly all."""
    text = _measured(100 * fraction, digits)
    while text.startswith("100") and fraction < 1 and digits < _MOST_DIGITS:
        digits += 1
        text = _measured(100 * fraction, digits)
    return f"{text}{THIN}%"


def size(count: float, digits: int = 3) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least 1."""
    return _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"), digits)


def bandwidth(bytes_per_s: float, digits: int = 3) -> str:
    """Return a number of bytes a second in decimal units, as memory is specified."""
    return _scaled(bytes_per_s, 1000, ("bytes/s", "kB/s", "MB/s", "GB/s", "TB/s"), digits)


def count(value: float, digits: int = 3) -> str:
    """Return a large count in words: "9.40 billion"; below a million in full."""
    if value < 1e6:
        return number(value)
    return _scaled(value, 1000, ("", "thousand", "million", "billion", "trillion"), digits)


def duration(seconds: float, digits: int = 3) -> str:
    """Return a number of seconds as µs, ms, s, min or h."""
    if not math.isfinite(seconds):
        return number(seconds)
    magnitude = abs(seconds)
    for bound, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if magnitude < bound and magnitude > 0:
            return f"{_measured(seconds * factor, digits)}{FIXED}{unit}"
    return f"{_measured(seconds / 3600, digits)}{FIXED}h" if magnitude else f"0{FIXED}s"


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """Return ``value`` with its unit, in the multiple of it that reads best."""
    if unit == "bytes":
        return size(value, digits)
    if unit == "s":
        return duration(value, digits)
    if unit in ("fraction", "share"):
        return percent(value, digits)
    if unit == "ratio":
        return ratio(value, digits)
    return f"{number(value, digits)}{FIXED}{unit}" if unit else number(value, digits)


def bound(value: float, unit: str) -> str:
    """Return ``value`` as the bound of a measurement that is shown with its unit.

    The unit is repeated where it is scaled.
    """
    return quantity(value, unit) if unit in ("share", "s") else number(value)


def sample(gate: Gate) -> str:
    """Return the sample that a gate rests on; if it is too small, also how much would do."""
    if gate.documents_needed is None:
        return gate.sample
    return f"{gate.sample}; about {number(gate.documents_needed)} {gate.needed_unit} would decide"


def value_and_limit(value: float, limit: float, unit: str) -> tuple[str, str]:
    """Return both with so many digits that they only read the same if they are the same."""
    for digits in range(3, _MOST_DIGITS + 1):
        texts = quantity(value, unit, digits), quantity(limit, unit, digits)
        if texts[0] != texts[1] or value == limit:
            break
    return texts


def headroom(value: float, limit: float, direction: Literal["at most", "at least"]) -> float | None:
    """Return the distance to the limit as a fraction of it, positive on the allowed side; None if there is no scale."""
    if not (math.isfinite(value) and math.isfinite(limit)) or limit == 0:
        return None
    distance = limit - value if direction == "at most" else value - limit
    return distance / abs(limit)


def brief_size(count: float) -> str:
    """Return a number of bytes in B, KiB, MiB or GiB, to one decimal."""
    value, power = _in_multiples(count, 1024, 3)
    return f"{value:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def brief_duration(seconds: float) -> str:
    """Return a span of time in s, min or h, rounded to what matters."""
    for bound, factor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < bound:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def brief_span(low: float, high: float) -> str:
    """Return a range of spans of time in the unit of its end, as "8 to 11 h"; one figure where both read the same."""
    factor, unit = (1, "s") if high < 90 else (60, "min") if high < 5400 else (3600, "h")
    digits = 1 if unit == "h" and high < 10 * factor else 0
    ends = [f"{end / factor:.{digits}f}" for end in (low, high)]
    return f"{' to '.join(dict.fromkeys(ends))} {unit}"


def brief_share(fraction: float) -> str:
    """Return ``fraction`` (0 to 1) in percent, to one decimal."""
    return f"{fraction:.1%}"


def brief_ratio(ratio: float) -> str:
    """Return a factor to two decimals, as "1.25x"."""
    return f"{ratio:.2f}x"


def brief_divergence(nats: float, decimals: int = 4) -> str:
    """Return nats to ``decimals``; what that would round to nothing is shown by its power."""
    fixed = f"{nats:.{decimals}f}"
    return f"{nats:.0e}" if nats and not float(fixed) else fixed


def _scaled(value: float, step: int, units: tuple[str, ...], digits: int) -> str:
    if not math.isfinite(value):
        return number(value)
    value, power = _in_multiples(value, step, len(units) - 1)
    text = number(value) if power == 0 else _measured(value, digits)
    return f"{text}{FIXED}{units[power]}".rstrip(FIXED)


def _in_multiples(value: float, step: int, most: int) -> tuple[float, int]:
    """Return ``value`` divided by the largest power of ``step``, at most ``most``, that leaves at least 1."""
    power = 0
    while abs(value) >= step and power < most:
        value /= step
        power += 1
    return value, power


def _measured(value: float, digits: int) -> str:
    """``number``, but with trailing zeros where ``value`` happens to be an integer: 3.00, not 3."""
    if math.isfinite(value) and value != 0 and float(value).is_integer() and abs(value) < 10 ** (digits - 1):
        return f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}".replace("-", "−")
    if math.isfinite(value) and abs(value) >= 10**digits and digits == 3:
        return f"{value:,.0f}".replace(",", THIN).replace("-", "−")
    return number(value, digits)
