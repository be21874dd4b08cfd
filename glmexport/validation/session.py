"""The exported graph in ONNX Runtime, as it is deployed: its provider, its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from glmexport.bundle import SCORING, Manifest
from glmexport.bundle.links import loadable
from glmexport.errors import BundleError, MachineError
from glmexport.graph import ATTENTION_MASK, INPUT_IDS, LOGITS
from glmexport.host import providers
from glmexport.loop import FixedLoopConfig, read_loop
from glmexport.target import Provider
from glmexport.validation.caches import empty_cache
from glmexport.validation.fixed import FixedGraph


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


class ScoringSession:
    """scoring.onnx of a bundle, for logits of every position.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of the target's name.
        BundleError: ONNX Runtime refuses the graph, or the bundle's loop.json cannot be read.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        self._session = open_session(
            directory / SCORING, manifest.target.provider, threads, config=manifest.target.session.config
        )
        loop = read_loop(directory)
        self._fixed = FixedGraph(self._session, loop) if isinstance(loop, FixedLoopConfig) else None
        self._caches = {
            value.name: (value.shape, value.type)
            for value in self._session.get_inputs()
            if value.name not in (INPUT_IDS, ATTENTION_MASK)
        }

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [length, vocabulary] fp32 after each of ``ids`` [length] int64, from an empty cache.

        Raises:
            InputError: caches of a fixed capacity do not hold so many.
        """
        if self._fixed:
            return torch.from_numpy(self._fixed.scores(ids.numpy()))
        given = {INPUT_IDS: ids[None].numpy(), ATTENTION_MASK: np.ones((1, len(ids)), np.int64)}
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        # A cache that grows begins empty; one of fixed capacity has room for all.
        sizes = {"batch": 1, "past_sequence": 0, "capacity": len(ids)}
        for name, (shape, kind) in self._caches.items():
            feeds[name] = empty_cache([sizes.get(size, size) for size in shape], kind)
        (logits,) = self._session.run_with_ort_values([LOGITS], feeds)
        return torch.from_numpy(logits.numpy()[0])
