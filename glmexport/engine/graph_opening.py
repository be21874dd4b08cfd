"""The engines over graphs in ONNX Runtime: of bundles with caches of their own, and of sequences computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import onnxruntime

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import DraftConfig, FixedLoopConfig, LoopConfig
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, RECENT_LOGITS, SHORT_STEP
from glmexport.engine.batched import BatchedEngine
from glmexport.engine.core.cache import cache_specs
from glmexport.engine.core.drafting import Drafter, PromptLookup
from glmexport.engine.core.graph_engine import EngineLimits, FixedEngine, GraphEngine
from glmexport.engine.core.graphs import FixedGraph, FixedNames, GraphNames, MaskedGraph
from glmexport.engine.core.sequence import Engine
from glmexport.engine.options import EngineOptions, computes_together
from glmexport.engine.session import open_session
from glmexport.engine.token_prediction import TokenPredictor
from glmexport.foundation.errors import InputError
from glmexport.foundation.host import CPU_PROVIDER

_PAST, _PRESENT = "past_key_values", "present"


def fixed_names(config: FixedLoopConfig, session: onnxruntime.InferenceSession) -> FixedNames:
    """Return the names of a graph of a bundle of fixed shapes."""
    caches = cache_specs(session, config.caches)
    return FixedNames(
        config.input_ids, config.position_ids, config.asked_position, config.logits, caches, config.context_length
    )


def _open_batched(bundle: Bundle, config: GenaiConfig, options: EngineOptions) -> BatchedEngine:
    target = bundle.manifest.target
    if not computes_together(bundle):
        raise InputError(
            f"Answers are computed together on {CPU_PROVIDER} alone, and {bundle.directory} is for another provider.",
            next_step="Leave --batch out.",
        )
    session = open_session(
        bundle.directory / MODEL, target.provider, options.threads, options.profile, target.session.config
    )
    outputs = {
        value.name: value.name.replace(_PAST, _PRESENT)
        for value in session.get_inputs()
        if value.name.startswith(_PAST)
    }
    names = GraphNames(INPUT_IDS, ATTENTION_MASK, LOGITS, cache_specs(session, outputs), RECENT_LOGITS)
    limits = EngineLimits(config.ends, config.context_length, SHORT_STEP)
    return BatchedEngine(MaskedGraph(session, names), limits, options.batch)


def _open_latent(bundle: Bundle, config: LoopConfig, options: EngineOptions) -> GraphEngine:
    _refuse_batch(bundle, options)
    speculation = options.speculation
    if speculation and speculation.tokens >= config.short_step:
        raise InputError(
            f"The graph of {bundle.directory} verifies {config.short_step - 1} tokens at a time, and "
            f"{speculation.tokens} are to be guessed.",
            next_step="Guess fewer, or build the bundle again with this version of glmexport.",
        )
    predicted = speculation is not None and speculation.method == "mtp"
    if predicted and not config.draft:
        raise InputError(
            f"{bundle.directory} has no draft graph: the original has no layer that predicts further ahead.",
            next_step="Take --speculate lookup or none.",
        )
    session = open_session(
        bundle.directory / config.graph, config.provider, options.threads, options.profile, config.session.config
    )
    names = GraphNames(
        config.input_ids,
        config.attention_mask,
        config.logits,
        cache_specs(session, config.caches),
        config.logits,
        config.hidden if predicted else None,
    )
    limits = EngineLimits(config.ends, config.context_length, config.short_step)
    drafter: Callable[[], Drafter] = PromptLookup
    if predicted and config.draft:
        drafter = _predictor(bundle, config, config.draft, options)
    return GraphEngine(MaskedGraph(session, names), limits, drafter)


def _predictor(
    bundle: Bundle, config: LoopConfig, draft: DraftConfig, options: EngineOptions
) -> Callable[[], TokenPredictor]:
    """Load the draft graph, and return a function that makes a drafter with it."""
    session = open_session(
        bundle.directory / draft.graph, config.provider, options.threads, config=config.session.config
    )
    caches = cache_specs(session, draft.caches)
    names = GraphNames(draft.input_ids, draft.attention_mask, draft.logits, caches, draft.logits, draft.hidden)
    return partial(TokenPredictor, MaskedGraph(session, names), draft.past_hidden, config.context_length)


def _open_fixed(bundle: Bundle, config: FixedLoopConfig, options: EngineOptions) -> FixedEngine:
    _refuse_batch(bundle, options)
    if options.speculation:
        raise InputError(
            f"{bundle.directory} has graphs of fixed shapes, which give the logits of one position, and guesses are "
            "verified by those of several.",
            next_step="Leave --speculate out.",
        )

    def opened(name: str, suffix: str) -> FixedGraph:
        profile = options.profile and options.profile.with_name(f"{options.profile.name}-{suffix}")
        session = open_session(
            bundle.directory / name, config.provider, options.threads, profile, config.session.config
        )
        return FixedGraph(session, fixed_names(config, session))

    limits = EngineLimits(config.ends, config.context_length)
    return FixedEngine(opened(config.graph, "chunk"), opened(config.step_graph, "step"), limits)


def _refuse_batch(bundle: Bundle, options: EngineOptions) -> None:
    if options.batch:
        raise InputError(
            f"{bundle.directory} runs in a loop in which sequences of several lengths are not computed together.",
            next_step="Leave --batch out.",
        )


#: The function that opens the engine of a bundle, by the type of its loop's settings.
GRAPH_ENGINES: Mapping[
    type[LoopConfig | FixedLoopConfig | GenaiConfig], Callable[[Bundle, Any, EngineOptions], Engine]
] = {GenaiConfig: _open_batched, LoopConfig: _open_latent, FixedLoopConfig: _open_fixed}
