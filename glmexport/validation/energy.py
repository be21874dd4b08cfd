"""Energy of processor packages and memory from Linux's RAPL counters (Documentation/power/powercap/powercap.rst)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
#: Directories of the counters. AMD's have the same name. intel-rapl-mmio is another view of the same packages.
_ZONES = "intel-rapl:*"


@dataclass(frozen=True)
class _Zone:
    counter: Path
    #: Value in µJ after which the counter starts from 0 again.
    range_uj: int


@dataclass(frozen=True)
class Rapl:
    """The counters of all packages and of the memory beside them; their parts (core, uncore) are in them already."""

    zones: tuple[_Zone, ...]

    def read(self) -> tuple[int, ...]:
        """Return the present value of every counter, in µJ."""
        return tuple(int(zone.counter.read_text(encoding="ascii")) for zone in self.zones)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the J between two readings, less than one wrap of a counter apart (minutes, at full load)."""
        return sum(
            (end - start if end >= start else end - start + zone.range_uj)
            for zone, start, end in zip(self.zones, before, after, strict=True)
        ) / 1e6  # fmt: skip


def open_rapl(root: Path = POWERCAP) -> Rapl | str:
    """Return the counters below ``root``, or a sentence that says why there are none to read."""
    zones = []
    for folder in sorted(root.glob(_ZONES)):
        try:
            name = (folder / "name").read_text(encoding="ascii").strip()
            # psys counts the whole board, packages and memory included.
            if not (name.startswith("package") or name == "dram"):
                continue
            limit = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
            counter = folder / "energy_uj"
            int(counter.read_text(encoding="ascii"))
        except PermissionError:
            return f"The energy counters below {root} are for the administrator only."
        except (OSError, ValueError):
            return f"The energy counters below {root} cannot be read."
        zones.append(_Zone(counter, limit))
    return Rapl(tuple(zones)) if zones else f"This machine shows no energy counters (RAPL) below {root}."
