"""The exported graph in ONNX Runtime, as it is deployed: its provider, its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from glmexport.bundle.links import loadable
from glmexport.engine.core.runtime import SessionSettings, create_session
from glmexport.foundation.errors import BundleError, MachineError
from glmexport.foundation.host import providers
from glmexport.foundation.target import Provider


def open_session(
    graph: Path,
    provider: Provider,
    threads: int,
    profile: Path | None = None,
    config: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Return a session of a graph of a bundle on its provider; ``profile`` begins the name of a profile.

    ``config`` are entries of the session's configuration.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses the graph.
    """
    require_provider(provider.name, provider.package)
    settings = SessionSettings(provider.name, threads, provider.options, config or {}, profile)
    path = loadable(graph.parent) / graph.name
    try:
        return create_session(path, settings)
    except MemoryError:
        # The machine lacks it: building the bundle again would not help.
        raise
    except Exception as error:  # onnxruntime has no common base class of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BundleError(
            f"ONNX Runtime cannot load {graph}: {reason}.",
            next_step="Build the bundle again with this version of glmexport.",
        ) from error


def require_provider(name: str, package: str) -> None:
    """Raise MachineError if this ONNX Runtime has no execution provider of that ``name``, which ``package`` has."""
    available = providers()
    if name not in available:
        raise MachineError(
            f"The bundle's target runs on {name}, which this ONNX Runtime does not have.",
            next_step=f"It has {', '.join(available)}. Validate on a machine of the target's class, with "
            f"{package} installed ('glmexport targets probe'), or by --device.",
        )


