"""Logits of every position of a text, as scoring.onnx computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from glmexport.bundle.loop import FixedLoopConfig, read_loop
from glmexport.bundle.manifest import Manifest
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, SCORING
from glmexport.engine.caches import empty_cache
from glmexport.engine.fixed import FixedGraph
from glmexport.engine.session import open_session


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
