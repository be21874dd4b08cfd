"""The report of one validation: its schema, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from glmexport.bundle.records import MatrixRecord
from glmexport.foundation.definition import Count, Number, read_json
from glmexport.foundation.errors import BundleError
from glmexport.foundation.target import Gates
from glmexport.foundation.untrusted import DocumentLimits
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.results.behaviour import Behaviour
from glmexport.results.device import DeviceResult
from glmexport.results.fidelity import Fidelity, Overlap, Share
from glmexport.results.gate import Gate
from glmexport.results.performance import Performance
from glmexport.results.prompts import PromptParity
from glmexport.results.record import Record, Verdict, worst
from glmexport.results.reference import ReferenceCheck
from glmexport.results.routing import LayerRouting
from glmexport.results.weights import WeightCheck

JSON_NAME = "report.json"
HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
JUNIT_NAME = "report.xml"
#: The file beside this module that holds ``schema_text``: validators of other languages need no Python.
SCHEMA_NAME = "report.schema.json"
#: A model of 60,000 matrices has a report of 2.5 million values, in 60 MB.
_LIMITS = DocumentLimits(size=128 << 20, values=4_000_000)


def _sorted(table: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(table.items()))


class Subject(Record):
    """The bundle that was validated, and the original that it was compared with."""

    bundle: str
    bundle_digest: str
    target: str
    recipe: str
    family: str
    checkpoint: str
    """The original: hub id or directory name."""
    checkpoint_digest: str
    """Digest of the original; with an adapter, of the two together."""
    adapter: str | None = None
    """The LoRA adapter that is merged into the original: hub id or directory name."""
    adapter_digest: str | None = None
    languages: tuple[str, ...]
    """BCP-47 tags of the languages that the bundle was validated for."""

    @model_validator(mode="after")
    def _adapter_has_a_digest(self) -> Self:
        if (self.adapter is None) != (self.adapter_digest is None):
            raise ValueError("adapter and adapter_digest belong together")
        return self


class Size(Record):
    """The bundle's size on disk, and the bits of a weight in it."""

    parameters: Count
    original_bytes: Count
    bundle_bytes: Count
    """Bytes of all files of the bundle."""
    weight_bytes: Count
    """Bytes of the weights in these files, with their scales and zero points."""
    bits_per_weight: Number
    """Mean number of bits over all weights, scales and zero points included, as stored."""
    bits_per_weight_linears: Number
    """Mean number of bits over the linears of the decoder blocks alone, counted like ``bits_per_weight``."""


class LinearResult(MatrixRecord, Record):
    """One quantized matrix and how well it kept its outputs on the calibration inputs."""

    name: str
    relative_error: Number
    """||G X - Wq X||^2 / ||G X||^2 on the calibration inputs X, as the quantized model before the matrix hands them on.

    The goal G is the original W with the correction that brings G X as near to the original model's output as held-out
    text confirms; W itself for a recipe without an asymmetric target.
    """
    round_to_nearest_error: Number
    """The relative error, against the same G, if every weight of W were rounded to its nearest code instead, with the
    recipe's search for scales: each weighted by the mean square of its column's input."""
    damping: Number
    """The value that was added to the Hessian's diagonal, as a fraction of its mean."""


class GroupResult(Record):
    """Matrices that were given one format together, so as to lose least within a budget of bits."""

    name: str
    matrices: tuple[str, ...]
    """Names of the group's matrices in ``linears``."""
    bits: Annotated[int, Field(ge=1, le=32)]
    group_size: int
    symmetric: bool
    codec: str = Field(default="affine", exclude_if=lambda value: value == "affine")
    """The meaning of a code: a whole number of steps from a zero point (affine), or a level of a table (nf4)."""
    stored_bits: Count
    """Bits of all its matrices in that format, scales and zero points included."""
    loss_nats: Number
    """Mean KL divergence, in nats, that the group causes alone in that format on held-out calibration text, rounded to
    nearest and everything else original."""
    tried: bool
    """Whether the loss was measured; False if it follows from that of another group size by the ratio of the errors at
    the matrices' outputs, or is a routed expert's share in that of all experts of its decoder block."""
    expert_part: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The part of a routed expert that it is; none for what every token passes."""
    cold: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether less than a quarter of an even spread of the text chose the expert. Half of the coverage of every expert
    is that of an even spread, so that it does not lose its bits because one text does not need it."""


class CoverageResult(Record):
    """The spread of the calibration text over the routed experts of one decoder block."""

    layer: int
    tokens: tuple[Count, ...]
    """Positions that chose each expert, by the quantized model's own router."""
    cold: tuple[Count, ...]
    """Experts, from 0, whose own positions are too few to fit anything to; their Hessians rest mostly on what they
    would read if every position chose them."""


class QuantizationSummary(Record):
    """The build's own account of quantization."""

    linears: tuple[LinearResult, ...]
    groups: tuple[GroupResult, ...] = ()
    """The groups that a budget's bits were given to, in the order of the model; empty for a recipe without a budget."""
    experts: tuple[CoverageResult, ...] = ()
    """The spread over the experts by decoder block; empty where there are no routed experts, or nothing was
    calibrated."""
    fallbacks: tuple[str, ...]
    """Each departure from the recipe, in a sentence; empty if there was none."""
    seconds: Number
    peak_memory_bytes: Count
    device: str = ""
    """The device that the arithmetic ran on; empty where the bundle was built some other time."""
    peak_device_bytes: Count = 0
    """Largest use of the memory of a device that has its own, in bytes; else 0."""


class CalibrationSummary(Record):
    """The text that the Hessians were measured on."""

    tokens: Count
    sequences: Count
    tokens_per_language: Annotated[dict[str, Count], AfterValidator(_sorted)]
    digest: str
    overlap: Overlap


class PolicySummary(Record):
    """The policy that the gates rest on."""

    source: str
    """The target's name, or that of the user's file."""
    gates: Gates


class Machine(Record):
    """The machine that validated, and so the one that the speeds are true of."""

    system: str
    processor: str
    cores: Annotated[int, Field(ge=1)] | None
    """Physical cores; None where a device does not tell."""
    memory_bytes: Count | None
    instruction_sets: tuple[str, ...]


class Report(Record):
    """Everything known about one bundle on one machine; the only source of every rendering."""

    schema_version: Literal[1]
    glmexport_version: str
    verdict: Verdict
    gates: tuple[Gate, ...]
    policy: PolicySummary
    subject: Subject
    size: Size
    fidelity: Fidelity
    prompts: PromptParity | None = None
    """The comparison of prompts; None where the original has no chat template."""
    reference: ReferenceCheck | None = None
    """The check of the original; None where it was not at hand, and nobody checked it when it was captured."""
    arithmetic: OriginalArithmetic | None = None
    """The arithmetic of the original; None where it was captured by a version that did not note it."""
    weights: WeightCheck | None = None
    """The check of the graph's numbers; None where the original was not at hand."""
    behaviour: Behaviour | None = None
    """The comparison of free answers; None where none were asked for, or the captured original has none."""
    shares: tuple[Share, ...]
    routing: tuple[LayerRouting, ...] = ()
    """The routing of a mixture of experts, layer by layer; empty for other models, or where it was not measured."""
    performance: Performance | None
    """The measured speed; None where it would say nothing of the machine, as on an emulated one."""
    performance_absent_because: str | None = None
    devices: tuple[DeviceResult, ...] = ()
    """The result of each device that was asked, where others than this machine were; empty otherwise. All figures
    outside of this list are those of the device named ``detailed``."""
    detailed: str | None = None
    """Name of the first device with the worst verdict, among those that answered; None if ``devices`` is empty."""
    quantization: QuantizationSummary | None
    """The account of quantization; None for a recipe that quantizes nothing, or if the build's record is not at
    hand."""
    calibration: CalibrationSummary | None
    machine: Machine
    versions: Annotated[dict[str, str], AfterValidator(_sorted)]
    command: str
    limits: tuple[str, ...]
    """The limits of this report: each sentence names one thing that it does not show."""

    @model_validator(mode="after")
    def _absence_has_a_reason(self) -> Self:
        if (self.performance is None) == (self.performance_absent_because is None):
            raise ValueError("give either performance or performance_absent_because")
        return self

    @model_validator(mode="after")
    def _details_are_of_a_device(self) -> Self:
        answered = [device.name for device in self.devices if device.fidelity]
        if (self.detailed not in answered) if self.devices else (self.detailed is not None):
            raise ValueError("detailed is not a device that answered")
        return self

    @model_validator(mode="after")
    def _verdict_is_no_better_than_the_gates(self) -> Self:
        bound = worst([*(gate.verdict for gate in self.gates), *(device.verdict for device in self.devices)])
        if self.verdict.severity < bound.severity:
            raise ValueError(f"verdict {self.verdict} is better than its gates allow ({bound})")
        return self


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``report.json``; every description carries its unit."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """Return ``json_schema`` as the text that is shipped in ``SCHEMA_NAME``."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def report_path(path: Path) -> Path:
    """Return ``path``, or the ``report.json`` in it if it is a directory such as a bundle."""
    return path / JSON_NAME if path.is_dir() else path


def read_report(path: Path) -> Report:
    """Read and check a ``report.json``.

    Raises:
        BundleError: no such file, not JSON, or not of the schema; names the file and the first wrong key.
    """
    try:
        return read_json(Report, path, _LIMITS)
    except OSError as error:
        raise BundleError(
            f"There is no readable report {path}: {error.strerror}.",
            next_step="Give the report.json that validate wrote.",
        ) from error
    except ValueError as error:
        raise BundleError(f"{path}: {error}.", next_step="Run validate again with this version.") from error
