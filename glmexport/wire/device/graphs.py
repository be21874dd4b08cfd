"""The job's graphs, opened in the engine by the job's description of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from glmexport.engine.core.cache import CacheSpec
from glmexport.engine.core.graph_engine import EngineLimits, FixedEngine, GraphEngine
from glmexport.engine.core.graphs import FixedGraph, FixedNames, GraphNames, MaskedGraph
from glmexport.engine.core.runtime import SessionSettings, create_session
from glmexport.wire.standalone import Failure


class JobGraphs:
    """The graphs of a ``job`` in its ``folder``, each loaded with so many ``threads`` when it is needed."""

    def __init__(self, job: dict[str, Any], folder: Path, threads: int) -> None:
        self._job = job
        self._folder = folder
        self._threads = threads
        #: The execution provider of the session that was loaded last.
        self.provider = ""

    def engine(self, profile: Path | None = None) -> GraphEngine | FixedEngine:
        """Return the engine for answers; ``profile`` begins the names of its profiles.

        Raises:
            Failure: the device's ONNX Runtime has no such execution provider.
        """
        graphs = self._job["graphs"]
        limits = EngineLimits(frozenset(self._job["end_tokens"]), self._job["context_length"])
        fixed = graphs.get("fixed")
        if fixed:
            chunk, step = (self._fixed(graph, profile) for graph in (graphs["generation"], fixed["step"]))
            return FixedEngine(chunk, step, limits)
        return GraphEngine(self._masked(graphs["generation"], profile), limits)

    def scorer(self) -> MaskedGraph | FixedGraph:
        """Return the graph for texts.

        Raises:
            Failure: the device's ONNX Runtime has no such execution provider.
        """
        graphs = self._job["graphs"]
        opened = self._fixed if graphs.get("fixed") else self._masked
        return opened(graphs["scoring"])

    def _masked(self, graph: str, profile: Path | None = None) -> MaskedGraph:
        graphs = self._job["graphs"]
        names = GraphNames(
            graphs["input_ids"], graphs["attention_mask"], graphs["logits"], self._caches(), graphs["logits"]
        )
        return MaskedGraph(self._session(graph, profile), names)

    def _fixed(self, graph: str, profile: Path | None = None) -> FixedGraph:
        graphs = self._job["graphs"]
        names = FixedNames(
            graphs["input_ids"],
            graphs["fixed"]["position_ids"],
            graphs["fixed"]["asked_position"],
            graphs["logits"],
            self._caches(),
            self._job["context_length"],
        )
        return FixedGraph(self._session(graph, profile), names)

    def _caches(self) -> tuple[CacheSpec, ...]:
        return tuple(
            CacheSpec(cache["input"], cache["output"], tuple(cache["shape"]), cache["dtype"])
            for cache in self._job["graphs"]["caches"]
        )

    def _session(self, graph: str, profile: Path | None) -> onnxruntime.InferenceSession:
        provider = self._job["provider"]
        available = onnxruntime.get_available_providers()
        if provider["name"] not in available:
            raise Failure(
                "provider",
                f"The bundle runs on {provider['name']}, which the device's ONNX Runtime does not have; it has "
                f"{', '.join(available)}.",
                "Install the ONNX Runtime that has it, or take a device of the target's class.",
            )
        named = profile and profile.with_name(f"{profile.name}-{Path(graph).stem}")
        settings = SessionSettings(provider["name"], self._threads, provider["options"], self._job["config"], named)
        session = create_session(self._folder / graph, settings)
        self.provider = session.get_providers()[0]
        return session
