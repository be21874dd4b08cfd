"""What a tuning compares, on what, and how much of that: decided before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from glmexport.architecture.description import Architecture
from glmexport.calibration.corpus import Document
from glmexport.foundation.evidence import FLOATS, CandidateSettings, Divergences
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.tuning.arithmetic import Arithmetic
from glmexport.tuning.candidates import EXACT_LEVEL, Axes, Numerics, axes_of, candidates, numerics, start_settings
from glmexport.tuning.measure import Workload
from glmexport.tuning.options import TuneOptions
from glmexport.tuning.pareto import too_divergent
from glmexport.tuning.slices import Slices, slices_of
from glmexport.validation.conditions import ValidationPlan
from glmexport.validation.texts import EvaluationSet, EvaluationText

#: Tokens of the short prompt.
_SHORT = 32


@dataclass(frozen=True)
class Measured:
    """Divergences by numerics, and why some are not legal."""

    divergences: Mapping[Numerics, Divergences]
    illegal: Mapping[Numerics, str]

    def is_legal(self, settings: CandidateSettings) -> bool:
        """Return whether a candidate may be taken."""
        return numerics(settings) not in self.illegal


@dataclass(frozen=True)
class TuningPlan:
    """The candidates, the text that their divergence is measured on, and the model that they are timed with."""

    target: Target
    options: TuneOptions
    #: Recipes to try, by the name or file that a target calls them by; the start's first.
    recipes: Mapping[str, Recipe]
    #: What the target says now.
    start: CandidateSettings
    axes: Axes
    candidates: tuple[CandidateSettings, ...]
    texts: tuple[EvaluationText, ...]
    slices: Slices
    workload: Workload

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        tokenizer: Tokenizer,
        target: Target,
        recipes: Mapping[str, Recipe],
        documents: Sequence[Document],
        options: TuneOptions,
    ) -> TuningPlan:
        """Plan the tuning of ``target`` for a model; ``documents`` are what its divergence is measured on."""
        start = start_settings(target, next(iter(recipes)), options.cores)
        axes = axes_of(target, architecture, recipes, start, options.cores, options.wanted)
        validation = ValidationPlan(positions_per_language=options.positions)
        texts = EvaluationSet(documents, tokenizer).texts(architecture.context_length, validation)
        # Fixed token ids, with room in the context for what is generated.
        length = max(1, min(options.prompt_tokens, architecture.context_length - options.generated_tokens))
        prompt = torch.cat([text.ids for text in texts])[:length].tolist()
        return cls(
            target=target,
            options=options,
            recipes=recipes,
            start=start,
            axes=axes,
            candidates=tuple(candidates(start, axes)),
            texts=tuple(texts),
            slices=slices_of(architecture),
            workload=Workload(tuple(prompt), min(_SHORT, max(1, len(prompt) // 2)), options.generated_tokens),
        )

    @property
    def allowance_nats(self) -> float:
        """Return the nats per token that a candidate may use up."""
        return self.options.allowance * self.target.gates.kl_mean_nats

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """Return every kind of arithmetic that is measured, the exact one first.

        Those with floats are what the scales of the others rest on.
        """
        floats = [Arithmetic(level, FLOATS) for level in (EXACT_LEVEL, *self.axes.accuracy_levels)]
        wanted = [Arithmetic(level, kind) for level in self.axes.accuracy_levels for kind in self.axes.kv_caches]
        return tuple(dict.fromkeys([*floats, *wanted]))

    def judged(self, found: Mapping[Numerics, Divergences]) -> Measured:
        """Return what was measured, and why some of it is not legal."""
        limit = self.target.gates.kl_mean_nats if self.options.calibrated else None
        base = found[numerics(self.start).exact]
        reasons = {
            kind: too_divergent(found[kind], base, self.allowance_nats, calibrated_limit=limit)
            for kind in found
            if kind.accuracy_level in self.axes.accuracy_levels and kind.kv_cache in self.axes.kv_caches
        }
        return Measured(found, {kind: reason for kind, reason in reasons.items() if reason})
