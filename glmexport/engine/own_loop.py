"""Our own loop for the caches that a bundle has."""

from __future__ import annotations

from pathlib import Path

from glmexport.bundle.loop import FixedLoopConfig, LoopConfig
from glmexport.engine.fixed_loop import FixedLoop
from glmexport.engine.latent_loop import LatentLoop
from glmexport.engine.speculation import Speculation


def open_loop(
    bundle: Path,
    config: LoopConfig | FixedLoopConfig,
    threads: int,
    profile: Path | None = None,
    speculation: Speculation | None = None,
) -> LatentLoop | FixedLoop:
    """The loop of a bundle whose loop.json is ``config``; ``profile`` begins the names of profiles.

    Raises:
        InputError: the bundle cannot do that speculation.
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses a graph.
    """
    if isinstance(config, FixedLoopConfig):
        return FixedLoop(bundle, config, threads, profile, speculation)
    return LatentLoop(bundle, config, threads, profile, speculation)
