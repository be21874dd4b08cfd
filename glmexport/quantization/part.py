"""The result of a step of a walk: quantized matrices, how each was found, and the largest number that was seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from glmexport.bundle.records import QuantizedMatrix
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.quantization.largest import Seen
from glmexport.quantization.store import WorkDirectory


@dataclass(frozen=True)
class QuantizedPart:
    """Quantized matrices by weight key, and the record of each in the same order."""

    matrices: dict[str, QuantizedLinear] = field(default_factory=dict)
    records: tuple[QuantizedMatrix, ...] = ()
    #: The largest number that the quantized model's activations had meanwhile; None: no text was run.
    largest: Seen | None = None
    #: Lines that people should see, such as a fallback that was taken.
    remarks: tuple[str, ...] = ()
    #: The seconds that it took in an earlier attempt.
    earlier_seconds: float = 0.0

    @classmethod
    def read(cls, work: WorkDirectory, step: str) -> QuantizedPart:
        """Return what was committed as ``step``."""
        record = work.record(step)
        assert record is not None
        note, largest = record["note"], record["note"].get("largest")
        return cls(
            {key: work.linear(step, key) for key in work.formats(step)},
            tuple(QuantizedMatrix.model_validate(entry) for entry in note["linears"]),
            Seen(*largest) if largest else None,
            earlier_seconds=note["seconds"],
        )

    def __add__(self, other: QuantizedPart) -> QuantizedPart:
        """Return this part followed by ``other``."""
        return QuantizedPart(
            self.matrices | other.matrices,
            self.records + other.records,
            largest_of((self.largest, other.largest)),
            self.remarks + other.remarks,
            self.earlier_seconds + other.earlier_seconds,
        )

    def weight(self, key: str) -> Tensor | None:
        """Return the matrix ``key`` [N, K] fp32 as it was quantized; None if it is not of this part."""
        linear = self.matrices.get(key)
        return None if linear is None else linear.dequantize()

    def note(self, seconds: float) -> dict[str, Any]:
        """Return what is noted of this part when it is committed, after ``seconds`` in this attempt."""
        linears = [record.model_dump() for record in self.records]
        return {"linears": linears, "seconds": seconds + self.earlier_seconds}


def largest_of(seen: Iterable[Seen | None]) -> Seen | None:
    """Return the one of the largest magnitude, the first of equal ones; None if there is none."""
    return max((each for each in seen if each), key=lambda each: each.magnitude, default=None)
