"""The choice of the engine that a bundle needs, by the settings of its loop."""

from __future__ import annotations

from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import require_memory
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.names import SHORT_STEP
from glmexport.engine.core.sequence import Engine
from glmexport.engine.genai import GenaiEngine
from glmexport.engine.options import EngineOptions
from glmexport.engine.speculation import Speculation
from glmexport.foundation.errors import InputError


def open_engine(
    bundle: Bundle,
    threads: int,
    *,
    batch: int = 0,
    speculation: Speculation | None = None,
    profile: Path | None = None,
) -> Engine:
    """Load a bundle in the loop that its caches need.

    Args:
        bundle: The bundle to load.
        threads: Threads within an operator.
        batch: Number of sequences whose steps are computed together, the most at a time; 0: each alone.
        speculation: The way to guess tokens, which may need a graph of its own.
        profile: The beginning of the name of every profile; without it none is written.

    Raises:
        InputError: the bundle cannot do the speculation, or its sequences cannot be computed together.
        BundleError: the file of its loop is broken, or the loop cannot load the bundle.
        MachineError: this ONNX Runtime has no execution provider of the bundle's, or memory lacks.
    """
    require_memory(bundle)
    options = EngineOptions(threads, batch, speculation, profile)
    loop = bundle.loop
    if isinstance(loop, GenaiConfig):
        _check_genai(bundle, options)
        if not batch:
            return GenaiEngine(bundle, loop, threads, profile)
    # Imported here, as onnxruntime-genai does not need the Python package onnxruntime, which takes 20 MiB of memory.
    from glmexport.engine.graph_opening import GRAPH_ENGINES

    return GRAPH_ENGINES[type(loop)](bundle, loop, options)


def _check_genai(bundle: Bundle, options: EngineOptions) -> None:
    speculation = options.speculation
    if speculation and speculation.method == "mtp":
        raise InputError(
            f"{bundle.directory} runs in onnxruntime-genai, and drafts by MTP are made only where latents are cached.",
            next_step="Take --speculate lookup or none.",
        )
    if speculation and speculation.tokens >= SHORT_STEP:
        raise InputError(
            f"The graph verifies {SHORT_STEP - 1} tokens at a time, and {speculation.tokens} are to be guessed.",
            next_step="Guess fewer.",
        )
