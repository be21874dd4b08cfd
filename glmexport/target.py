"""Target: what a class of hardware can do. One TOML file under ``targets``, or a file of the user's."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field

from glmexport.definition import Definition, locate, names, read_toml
from glmexport.errors import DefinitionError

TARGETS = "targets"
HOST = "host"


class Provider(Definition):
    """ONNX Runtime execution provider and its options."""

    name: str
    options: dict[str, str] = Field(default_factory=dict)


class Probe(Definition):
    """How a host is recognised; of the targets that match, the one with the highest rank is the host's."""

    machine: tuple[str, ...]
    cpu_flags: tuple[str, ...] = ()
    rank: int


class GraphLimits(Definition):
    """What a graph for this target may consist of."""

    opset: int
    ir_version: int
    #: Operators beyond the standard opset's that the provider runs, as ``domain::Operator``.
    contrib_operators: tuple[str, ...]
    activations: Literal["float32"] = "float32"
    #: Query, key and value projections as one matrix product.
    packed_qkv: bool
    #: Latent attention caches one latent a token and layer, which a loop of ours decodes with; otherwise the keys and
    #: values of every head, which onnxruntime-genai decodes with.
    latent_cache: bool = False


class WeightFormats(Definition):
    """Weight formats with fast kernels, and the arithmetic they run in."""

    bits: tuple[Literal[2, 4, 8], ...]
    group_sizes: tuple[int, ...]
    default_recipe: str
    #: MatMulNBits accuracy_level: 0 keeps fp32 activations, 4 quantizes them to int8 block by block.
    accuracy_level: Literal[0, 1, 2, 3, 4]


class SessionPlan(Definition):
    """How onnxruntime-genai runs a bundle here."""

    #: Tokens of a prompt that are read at a time, whose activations are in memory together; 0: all at once.
    prefill_tokens: int = Field(default=0, ge=0)


class Limits(Definition):
    """What a bundle must keep in one language; None: as in every other."""

    #: Mean KL divergence from the original, nats per token.
    kl_mean_nats: float | None = Field(default=None, gt=0)
    #: ln of (perplexity of the bundle / perplexity of the original).
    ln_perplexity_ratio: float | None = Field(default=None, gt=0)
    #: Share of positions where bundle and original agree on the most likely token.
    top1_agreement: float | None = Field(default=None, gt=0, lt=1)


class BehaviourLimits(Definition):
    """What answers may lose against the original's, over all languages together."""

    #: By how much all answers may be longer or shorter, as a share.
    length_ratio: float = Field(default=0.10, gt=0)
    #: Share of answers that end in a loop, do not end, are in another language or are no tool call any more.
    answers: float = Field(default=0.10, gt=0, lt=1)
    #: chrF of translations, 0 to 1.
    chrf: float = Field(default=0.03, gt=0, lt=1)
    #: Mean score of tasks of the user's, 0 to 1.
    tasks: float = Field(default=0.05, gt=0, lt=1)


class PerformanceLimits(Definition):
    """What the bundle must reach on the machine that validates it; None: it need not.

    They hold for that machine, so no shipped target sets any. Each is judged by itself by the bounds of what was
    measured: PASS if even the unfavourable one keeps it, BLOCK if not even the favourable one does.
    """

    #: Median time to first token, s.
    max_ttft_s: float | None = Field(default=None, gt=0)
    min_prefill_tokens_per_s: float | None = Field(default=None, gt=0)
    min_decode_tokens_per_s: float | None = Field(default=None, gt=0)
    #: Decoding rate of the bundle over that of the original.
    min_decode_ratio: float | None = Field(default=None, gt=0)
    #: Bytes, or with a unit, as "8GiB".
    max_peak_memory: ByteSize | None = Field(default=None, gt=0)
    #: J of each decoded token.
    max_energy_j_per_token: float | None = Field(default=None, gt=0)


class Gates(Definition):
    """The policy: limits that a bundle must keep in every language, and how sure that has to be.

    PASS says that each limit is kept with ``confidence``; BLOCK, that one is broken, at most one time in
    1 / (1 - confidence) for all limits and languages together. What lies between is INCONCLUSIVE.
    """

    kl_mean_nats: float = Field(gt=0)
    ln_perplexity_ratio: float = Field(gt=0)
    top1_agreement: float = Field(gt=0, lt=1)
    #: Positions of evaluation text below which a language is not judged.
    minimum_positions: int = Field(ge=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    #: Share of a limit beyond which, as surely, a bundle that keeps it gets a WARN.
    warn_at: float = Field(default=0.75, gt=0, le=1)
    behaviour: BehaviourLimits = BehaviourLimits()
    performance: PerformanceLimits = PerformanceLimits()
    #: Other limits for single languages, by BCP-47 tag.
    languages: dict[str, Limits] = Field(default_factory=dict)

    def limits(self, language: str) -> Limits:
        """Every limit for ``language``."""
        own = self.languages.get(language, Limits()).model_dump(exclude_none=True)
        return Limits(**{name: own.get(name, getattr(self, name)) for name in Limits.model_fields})


@dataclass(frozen=True)
class Policy:
    """Gates, and where they come from, for people."""

    source: str
    gates: Gates


def open_policy(path: Path) -> Policy:
    """The gates in a ``.toml`` file of the user's.

    Raises:
        DefinitionError: no such file, not TOML, an unknown key, or a value that no limit can have.
    """
    if not path.is_file():
        raise DefinitionError(f"There is no policy file {path}.", next_step="Give a .toml file (README, 'Gates').")
    return Policy(path.name, read_toml(path, Gates))


class Provenance(Definition):
    """Where the figures come from."""

    measured_on: str
    date: str
    notes: str = ""


class Target(Definition):
    """A class of hardware: provider, probes, legal graphs, fast formats, gates, and the evidence for them."""

    name: str
    summary: str
    provider: Provider
    probe: Probe
    graph: GraphLimits
    weights: WeightFormats
    session: SessionPlan = SessionPlan()
    gates: Gates
    provenance: Provenance

    def can(self, operator: str) -> bool:
        """Whether ``domain::Operator`` runs on this target's provider."""
        return operator in self.graph.contrib_operators


def open_target(name_or_path: str) -> Target:
    """The shipped target of that name, the one in that ``.toml`` file, or for ``host`` this machine's.

    Raises:
        DefinitionError: unknown name, unknown key, or no shipped target matches this host.
    """
    if name_or_path == HOST:
        return host_target(platform.machine().lower(), cpu_flags())
    path = locate("target", TARGETS, name_or_path)
    return read_toml(path, Target, {"name": path.stem})


def shipped_targets() -> list[Target]:
    """Every shipped target, by name."""
    return [open_target(name) for name in names(TARGETS)]


def host_target(machine: str, flags: Iterable[str]) -> Target:
    """The highest-ranked shipped target whose probe matches ``machine`` and CPU ``flags``.

    Raises:
        DefinitionError: none matches.
    """
    present = set(flags)
    matching = [
        target
        for target in shipped_targets()
        if machine in target.probe.machine and present.issuperset(target.probe.cpu_flags)
    ]
    if not matching:
        raise DefinitionError(
            f"No shipped target matches this host ({machine}).",
            next_step="Name one with --target, or write a .toml file for it (README, 'Add a target').",
        )
    return max(matching, key=lambda target: target.probe.rank)


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set flags of this processor in Linux's spelling; empty where they cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
