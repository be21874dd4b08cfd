"""The settings that a target leaves open: every legal mix of formats, arithmetic, projections and session settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from glmexport.architecture.description import Architecture
from glmexport.architecture.grouped import GroupedQueryAttention
from glmexport.foundation.evidence import FLOATS, CandidateSettings, KvCache
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.graph.caches import own_loop

#: Providers that have kernels for more than one accuracy_level; others ignore it.
_LEVELS = {"CPUExecutionProvider": (0, 4), "WebGpuExecutionProvider": (0, 4)}
#: Providers that have kernels for quantized caches, and the kinds that are tried if none are named.
_CACHES: dict[str, tuple[KvCache, ...]] = {"CPUExecutionProvider": (FLOATS, "int8", "int4")}
_TRIED_CACHES: tuple[KvCache, ...] = (FLOATS, "int8")
#: The level with fp32 activations, with which the others are compared.
EXACT_LEVEL = 0
#: Whether idle threads of the CPU's pool wait in a loop, which saves waking them and takes the processor from others.
SPINNING = "session.intra_op.allow_spinning"
_SESSION: dict[str, dict[str, tuple[str, ...]]] = {"CPUExecutionProvider": {SPINNING: ("1", "0")}}
#: Shares of the cores that are candidates for the number of threads.
_SHARES = (1.0, 0.75, 0.5, 0.25)

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Numerics:
    """The settings that decide the numbers that come out; all others decide only the speed."""

    recipe: str
    accuracy_level: int
    kv_cache: KvCache = FLOATS

    @property
    def exact(self) -> Numerics:
        """Numerics of the same weights in fp32 arithmetic."""
        return Numerics(self.recipe, EXACT_LEVEL)

    @property
    def label(self) -> str:
        """Its name for people."""
        cache = "" if self.kv_cache == FLOATS else f" with a cache in {self.kv_cache}"
        return f"{self.recipe} at accuracy_level {self.accuracy_level}{cache}"


def numerics(settings: CandidateSettings) -> Numerics:
    """Return the part of ``settings`` that decides the numbers."""
    return Numerics(settings.recipe, settings.accuracy_level, settings.kv_cache)


@dataclass(frozen=True)
class Axes:
    """The values of every setting; a candidate has one of each."""

    recipes: tuple[str, ...]
    accuracy_levels: tuple[int, ...]
    packed_qkv: tuple[bool, ...]
    kv_caches: tuple[KvCache, ...]
    threads: tuple[int, ...]
    #: Values by the name of a session entry.
    session: Mapping[str, tuple[str, ...]]
    #: Values by the name of a provider option.
    provider: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class WantedValues:
    """Values to try in place of the usual ones; empty: the usual ones."""

    #: Caches to try in place of floats and 8 bits, where the provider and every recipe have them.
    kv_caches: tuple[KvCache, ...] = ()
    #: Numbers of threads to try in place of shares of the cores.
    threads: tuple[int, ...] = ()
    #: Further entries of the session's configuration, each with values.
    session: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Further options of the provider, each with values.
    provider: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


#: The usual values alone.
USUAL = WantedValues()


def start_settings(target: Target, recipe: str, cores: int) -> CandidateSettings:
    """Return the present settings of ``target``; those that it leaves to the runtime have the runtime's default."""
    return CandidateSettings(
        recipe=recipe,
        accuracy_level=target.weights.accuracy_level,
        packed_qkv=target.graph.packed_qkv,
        kv_cache=target.graph.kv_cache,
        threads=target.session.threads or cores,
        session=target.session.config,
        provider=target.provider.options,
    )


def axes_of(
    target: Target,
    architecture: Architecture,
    recipes: Mapping[str, Recipe],
    start: CandidateSettings,
    cores: int,
    wanted: WantedValues = USUAL,
) -> Axes:
    """Return the alternatives that are legal for ``target`` and make a difference for ``architecture``.

    Args:
        target: the abilities of the hardware; nothing beyond them is a candidate.
        architecture: the architecture whose graph is lowered.
        recipes: recipes whose formats the target has kernels for, by the name or file that a target calls them by.
        start: the present settings, which are always among the candidates.
        cores: the most threads, if none are given.
        wanted: values to try in place of the usual ones.
    """
    quantizes = any(recipe.quantizes_linears for recipe in recipes.values())
    levels = _LEVELS.get(target.provider.name, ()) if quantizes else ()
    packs = any(
        isinstance(layer.attention, GroupedQueryAttention) and not layer.attention.norms
        for layer in architecture.layers
    )
    # Scales of quantized caches are calibrated, and latents are not quantized.
    calibrates = all(recipe.calibration for recipe in recipes.values())
    quantizable = calibrates and not own_loop(architecture, target.graph)
    offered = _CACHES.get(target.provider.name, ()) if quantizable else ()
    caches = [kind for kind in wanted.kv_caches or _TRIED_CACHES if kind in offered]
    counts = wanted.threads or tuple(max(1, round(cores * share)) for share in _SHARES)
    entries = {**_SESSION.get(target.provider.name, {}), **wanted.session}
    return Axes(
        recipes=_unique(start.recipe, *recipes),
        accuracy_levels=_unique(start.accuracy_level, *levels),
        # A target says if it cannot multiply with packed projections.
        packed_qkv=_unique(start.packed_qkv, *([False] if packs and target.graph.packed_qkv else [])),
        kv_caches=_unique(start.kv_cache, *caches),
        threads=_unique(start.threads, *counts),
        session=entries,
        provider=wanted.provider,
    )


def candidates(start: CandidateSettings, axes: Axes) -> list[CandidateSettings]:
    """Return every combination once, the start first."""
    found = {identity(start): start}
    product = itertools.product(
        axes.recipes,
        axes.accuracy_levels,
        axes.packed_qkv,
        axes.kv_caches,
        axes.threads,
        _combinations(axes.session),
        _combinations(axes.provider),
    )
    for recipe, level, packed, cached, threads, session, provider in product:
        settings = CandidateSettings.model_validate(
            {
                "recipe": recipe,
                "accuracy_level": level,
                "packed_qkv": packed,
                "kv_cache": cached,
                "threads": threads,
                "session": _with_defaults(start.session, session),
                "provider": {**start.provider, **provider},
            }
        )
        found.setdefault(identity(settings), settings)
    return list(found.values())


def _with_defaults(start: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Leave out an entry that has the runtime's default, so that two spellings are one candidate."""
    merged = {**start, **changes}
    return {name: value for name, value in merged.items() if name in start or (name, value) != (SPINNING, "1")}


def identity(settings: CandidateSettings) -> str:
    """Return a text that is equal for equal settings, whatever the order of their entries."""
    ordered = settings.model_copy(
        update={"session": dict(sorted(settings.session.items())), "provider": dict(sorted(settings.provider.items()))}
    )
    return ordered.model_dump_json()


def with_settings(target: Target, settings: CandidateSettings) -> Target:
    """Return ``target`` with every setting of a candidate."""
    return target.model_copy(
        update={
            "provider": target.provider.model_copy(update={"options": settings.provider}),
            "graph": target.graph.model_copy(update={"packed_qkv": settings.packed_qkv, "kv_cache": settings.kv_cache}),
            "weights": target.weights.model_copy(
                update={"default_recipe": settings.recipe, "accuracy_level": settings.accuracy_level}
            ),
            "session": target.session.model_copy(update={"threads": settings.threads, "config": settings.session}),
        }
    )


def label(settings: CandidateSettings) -> str:
    """Return a short name for people."""
    activations = {0: "fp32", 1: "fp32", 2: "fp16", 3: "bf16", 4: "int8"}[settings.accuracy_level]
    parts = [
        settings.recipe,
        activations,
        f"{'fused' if settings.packed_qkv else 'split'} QKV",
        *([f"{settings.kv_cache} cache"] if settings.kv_cache != FLOATS else []),
        f"{settings.threads} thread{'s' if settings.threads > 1 else ''}",
        *(f"{name.rpartition('.')[2]}={value}" for name, value in sorted(settings.session.items())),
        *(f"{name}={value}" for name, value in sorted(settings.provider.items())),
    ]
    return ", ".join(parts)


def _combinations(values: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _unique(*values: T) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
