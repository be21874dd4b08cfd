"""The exported graph in ONNX Runtime, as it is deployed: its provider, its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from glmexport.bundle.links import loadable
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
    """A graph of a bundle on its target's provider; ``profile`` begins the name of a profile.

    ``config`` are entries of the session's configuration.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of that name.
        BundleError: ONNX Runtime refuses the graph.
    """
    require_provider(provider.name, provider.package)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in (config or {}).items():
        options.add_session_config_entry(name, value)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    path = loadable(graph.parent) / graph.name
    try:
        return onnxruntime.InferenceSession(path, options, providers=[(provider.name, dict(provider.options))])
    except MemoryError:
        # The machine's: building the bundle again would not help.
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


