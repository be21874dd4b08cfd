"""The settings that every engine is opened with, and what they may be for a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.engine.speculation import Speculation
from glmexport.foundation.host import CPU_PROVIDER


@dataclass(frozen=True)
class EngineOptions:
    """The settings of an engine, as ``open_engine`` takes them."""

    threads: int
    batch: int
    speculation: Speculation | None
    profile: Path | None


def computes_together(bundle: Bundle) -> bool:
    """Return whether the loop of a bundle computes the steps of several sequences in one run."""
    return isinstance(bundle.loop, GenaiConfig) and bundle.manifest.target.provider.name == CPU_PROVIDER
