"""The settings that every engine is opened with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmexport.engine.speculation import Speculation


@dataclass(frozen=True)
class EngineOptions:
    """The settings of an engine, as ``open_engine`` takes them."""

    threads: int
    batch: int
    speculation: Speculation | None
    profile: Path | None
