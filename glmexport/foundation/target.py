"""Targets say what a class of hardware can do. One is a TOML file under ``targets``, or a file of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from glmexport.foundation.definition import Definition, checked, names, read_toml
from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.evidence import FLOATS, Evidence, KvCache
from glmexport.foundation.host import Host
from glmexport.foundation.inheritance import Source, open_source
from glmexport.foundation.provenance import Provenance, with_inherited_claims
from glmexport.foundation.session_settings import check_provider, check_session_entries

TARGETS = "targets"
HOST = "host"


class Provider(Definition):
    """An ONNX Runtime execution provider and its options."""

    name: str
    options: dict[str, str] = Field(default_factory=dict)
    #: The kind of ONNX Runtime that has the provider: the native one, or that of browsers.
    runtime: Literal["onnxruntime", "onnxruntime-web"] = "onnxruntime"
    #: The package that has to be installed for the provider.
    package: str = "onnxruntime"

    @model_validator(mode="after")
    def _may_be_set(self) -> Self:
        check_provider(self.name, self.options)
        return self


class HostProbe(Definition):
    """The rule by which a host is recognised.

    Of the targets that match, the one with the highest rank is the host's.
    """

    #: Processor architectures; empty: any.
    machine: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    #: The least compute capability of an NVIDIA GPU.
    compute_capability: float | None = None
    rank: int


class GraphLimits(Definition):
    """The limits of what a graph for this target may consist of."""

    opset: int
    ir_version: int
    #: Operators beyond the standard opset's that the provider runs, as ``domain::Operator``.
    contrib_operators: tuple[str, ...]
    #: Type of activations, norms' gains, biases and scales. Token ids are int64 and logits fp32 in any case.
    activations: Literal["float32", "float16", "bfloat16"] = "float32"
    #: Whether query, key and value projections are one matrix product.
    packed_qkv: bool
    #: Whether GroupQueryAttention rotates queries and keys itself; otherwise RotaryEmbedding does before it.
    rope_in_attention: bool = True
    #: The type that keys and values are cached in: the activations' own type, or integers with calibrated scales.
    kv_cache: KvCache = FLOATS
    #: Whether each channel of a head, or a whole cache, has one scale.
    kv_scales: Literal["channel", "tensor"] = "channel"
    #: The form of an RMSNorm that no addition is fused with: the runtime's own operator, or standard arithmetic in
    #: fp32.
    norm: Literal["operator", "arithmetic"] = "operator"
    #: Whether routed experts can be branches of the graph; otherwise mixtures of experts are refused.
    expert_branches: bool = True
    #: Whether latent attention caches one latent a token and layer, which a loop of ours decodes with. Otherwise it
    #: caches the keys and values of every head, which onnxruntime-genai decodes with.
    latent_cache: bool = False
    #: Whether the provider compiles graphs of fixed shapes only: one for a chunk of a prompt and one for a single
    #: token.
    static_shapes: bool = False
    #: Sizes of graphs of fixed shapes: positions of a chunk, and positions that caches hold, if the model's context
    #: does.
    chunk: int = Field(default=64, ge=2)
    capacity: int = Field(default=4096, ge=2)


class WeightFormats(Definition):
    """The weight formats with fast kernels, and the arithmetic they run in."""

    bits: tuple[Literal[2, 4, 8], ...]
    group_sizes: tuple[int, ...]
    default_recipe: str
    #: The form of quantized products: MatMulNBits over packed codes, or DequantizeLinear and MatMul (QDQ).
    form: Literal["MatMulNBits", "QDQ"] = "MatMulNBits"
    #: Whether formats without zero points are the only ones.
    symmetric_only: bool = False
    #: MatMulNBits accuracy_level: 0 keeps the activations as they are, 4 quantizes them to int8 block by block.
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0


class MemoryLimits(Definition):
    """The sizes that a bundle may not exceed on this hardware; None: no limit but the machine's own memory."""

    #: Bytes of the largest single tensor, which is one buffer of the device.
    max_tensor_bytes: ByteSize | None = Field(default=None, gt=0)
    #: Bytes of the largest file of weights; a block that is larger is split.
    max_file_bytes: ByteSize | None = Field(default=None, gt=0)
    #: Bytes of all weights together.
    max_weight_bytes: ByteSize | None = Field(default=None, gt=0)


class SessionOptions(Definition):
    """The settings of an ONNX Runtime session that are fast on the target."""

    #: Threads within an operator; None: as many as the machine has cores.
    threads: int | None = Field(default=None, ge=1)
    #: Configuration entries, for example ``"session.intra_op.allow_spinning" = "0"``.
    config: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _may_be_set(self) -> Self:
        check_session_entries(self.config)
        return self


class Limits(Definition):
    """The limits that a bundle must keep in one language; None: as in every other."""

    #: Mean KL divergence from the original, nats per token.
    kl_mean_nats: float | None = Field(default=None, gt=0)
    #: ln of (perplexity of the bundle / perplexity of the original).
    ln_perplexity_ratio: float | None = Field(default=None, gt=0)
    #: Share of positions where bundle and original agree on the most likely token.
    top1_agreement: float | None = Field(default=None, gt=0, lt=1)


class BehaviourLimits(Definition):
    """The limits of what answers may lose against the original's, over all languages together."""

    #: Share by which all answers may be longer or shorter.
    length_ratio: float = Field(default=0.10, gt=0)
    #: Share of answers that end in a loop, do not end, are in another language or are no tool call any more.
    answers: float = Field(default=0.10, gt=0, lt=1)
    #: chrF of translations, 0 to 1.
    chrf: float = Field(default=0.03, gt=0, lt=1)
    #: Mean score of tasks of the user's, 0 to 1.
    tasks: float = Field(default=0.05, gt=0, lt=1)


class PerformanceLimits(Definition):
    """The speed that a bundle must reach on the machine that validates it; None: it need not.

    They hold for that machine, so no shipped target sets any. Each is judged by itself by the bounds of what was
    measured: PASS if even the unfavourable one keeps it, BLOCK if not even the favourable one does.
    """

    #: Median time to first token, s.
    max_ttft_s: float | None = Field(default=None, gt=0)
    min_prefill_tokens_per_s: float | None = Field(default=None, gt=0)
    min_decode_tokens_per_s: float | None = Field(default=None, gt=0)
    #: Decoding rate of the bundle over that of the original.
    min_decode_ratio: float | None = Field(default=None, gt=0)
    #: A size in bytes, or with a unit, as "8GiB".
    max_peak_memory: ByteSize | None = Field(default=None, gt=0)
    #: Energy of each decoded token, J.
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
        """Return every limit for ``language``."""
        own = self.languages.get(language, Limits()).model_dump(exclude_none=True)
        return Limits(**{name: own.get(name, getattr(self, name)) for name in Limits.model_fields})


@dataclass(frozen=True)
class Policy:
    """The gates, and where they come from, for people."""

    source: str
    gates: Gates


def open_policy(path: Path) -> Policy:
    """Return the gates in a ``.toml`` file of the user's.

    Raises:
        DefinitionError: no such file, not TOML, an unknown key, or a value that no limit can have.
    """
    if not path.is_file():
        raise DefinitionError(f"There is no policy file {path}.", next_step="Give a .toml file (README, 'Gates').")
    return Policy(path.name, read_toml(path, Gates))


class Target(Definition):
    """A class of hardware: provider, probes, legal graphs, fast formats, gates, and the evidence for them."""

    name: str
    summary: str
    provider: Provider
    probe: HostProbe
    graph: GraphLimits
    weights: WeightFormats
    session: SessionOptions = SessionOptions()
    memory: MemoryLimits = MemoryLimits()
    gates: Gates
    provenance: Provenance
    #: The evidence of a target that ``glmexport tune`` wrote.
    evidence: Evidence | None = None

    @model_validator(mode="after")
    def _claims_are_about_keys(self) -> Self:
        for key in self.provenance.claims:
            self.value(key)
        return self

    def value(self, key: str) -> object:
        """Return the value of a key such as ``graph.opset``.

        Raises:
            ValueError: there is no such key.
        """
        found: object = self
        for part in key.split("."):
            if not isinstance(found, Definition) or part not in type(found).model_fields:
                raise ValueError(f"provenance.claims: a target has no key {key!r}")
            found = getattr(found, part)
        return found

    def can(self, operator: str) -> bool:
        """Return whether ``domain::Operator`` runs on this target's provider."""
        return operator in self.graph.contrib_operators

    def lacking(self, host: Host) -> list[str]:
        """Return what ``host`` lacks to be of this class, a sentence each; empty if it lacks nothing."""
        provider, probe = self.provider, self.probe
        if provider.runtime != "onnxruntime":
            return [f"It is a browser's, where {provider.runtime} runs; from here no browser can be told."]
        found = []
        if provider.name not in host.providers:
            found.append(
                f"ONNX Runtime has no {provider.name} here ({', '.join(host.providers)}); pip install "
                f"{provider.package} has it."
            )
        if probe.machine and host.machine not in probe.machine:
            found.append(f"The processor is {host.machine}, not {' or '.join(probe.machine)}.")
        absent = [flag for flag in probe.cpu_flags if flag not in host.cpu_flags]
        if absent:
            found.append(f"The processor has no {', '.join(absent)}.")
        if probe.compute_capability is not None:
            capability = host.compute_capability
            if capability is None:
                found.append("No NVIDIA GPU is told of by nvidia-smi.")
            elif capability < probe.compute_capability:
                found.append(f"The GPU has compute capability {capability}, and {probe.compute_capability} is needed.")
        return found


def open_target(name_or_path: str) -> Target:
    """Return the shipped target of that name, the one in that ``.toml`` file, or for ``host`` this machine's.

    Raises:
        DefinitionError: unknown name, unknown key, what cannot be inherited, or no shipped target matches this host.
    """
    if name_or_path == HOST:
        return host_target(Host.this())
    source = target_source(name_or_path)
    return checked(source, {**with_inherited_claims(source), "name": source.path.stem}, Target)


def target_source(name_or_path: str) -> Source:
    """Return the file of a target, and the one that it extends; ``host`` is no file's name.

    Raises:
        DefinitionError: unknown name, not TOML, or a target that cannot be extended.
    """
    return open_source("target", TARGETS, name_or_path)


def shipped_targets() -> list[Target]:
    """Return every shipped target, by name."""
    return [open_target(name) for name in names(TARGETS)]


def host_target(host: Host) -> Target:
    """Return the highest-ranked shipped target that ``host`` is of.

    Raises:
        DefinitionError: it is of none.
    """
    matching = [target for target in shipped_targets() if not target.lacking(host)]
    if not matching:
        raise DefinitionError(
            f"No shipped target matches this host ({host.machine}).",
            next_step="Name one with --target, or write a .toml file for it (README, 'Add a target').",
        )
    return max(matching, key=lambda target: target.probe.rank)
