"""Records of what one of several devices made of the bundle."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from glmexport.foundation.definition import Count
from glmexport.results.behaviour import Behaviour
from glmexport.results.fidelity import Fidelity
from glmexport.results.gate import Gate
from glmexport.results.performance import Performance
from glmexport.results.record import Record, Verdict, worst


class DeviceFacts(Record):
    """Facts that a device tells about itself."""

    system: str
    processor: str
    instruction_sets: tuple[str, ...] = ()
    """Instruction sets of the processor, in Linux's spelling; those that matter to quantized kernels."""
    cores: Annotated[int, Field(ge=1)] | None
    """Physical cores; none where nobody tells."""
    memory_bytes: Count | None
    runtime: str
    """Name and version of the runtime, for example "onnxruntime 1.32.0"."""
    provider: str
    """The execution provider that the graph was opened on."""
    adapter: str | None = None
    """The graphics adapter, where there is one."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what the arithmetic depends on."""
    emulated: str | None = None
    """The reason why the speed of an emulated device says nothing; None for any other device."""


class DeviceResult(Record):
    """The result of one device: what it measured, or why it did not."""

    name: str
    device_class: str
    """Class of the device: devices of one class share a column."""
    verdict: Verdict
    failure: str | None
    """The reason why there are no answers, and so nothing was measured; None if there are."""
    facts: DeviceFacts | None
    fidelity: Fidelity | None
    behaviour: Behaviour | None
    """The comparison of free answers; None where none were captured of the original, or the device failed."""
    performance: Performance | None
    performance_absent_because: str | None
    gates: tuple[Gate, ...]

    @model_validator(mode="after")
    def _measured_or_failed(self) -> Self:
        if (self.failure is None) != (self.fidelity is not None) or (self.fidelity is None) != (self.facts is None):
            raise ValueError("give either facts and fidelity, or failure")
        if self.failure is None and (self.performance is None) == (self.performance_absent_because is None):
            raise ValueError("give either performance or performance_absent_because")
        return self

    @model_validator(mode="after")
    def _verdict_is_no_better_than_the_gates(self) -> Self:
        if self.verdict.severity < worst(gate.verdict for gate in self.gates).severity:
            raise ValueError(f"verdict {self.verdict} is better than the gates of {self.name} allow")
        return self
