"""The divergence of each arithmetic and format over the whole model, run in ONNX Runtime one block at a time.

Each block is lowered as a bundle's would be and run in a session of its own, on the residual stream that the blocks
before it gave. The stream after the last one is that of the whole graph, with one block in memory. The
activations of every candidate are committed after each block, so that a measurement that is killed goes on there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmexport.architecture.description import DecoderLayer
from glmexport.assembly.cache_scales import CacheGauges, set_scales
from glmexport.assembly.external import write_graphs
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, STREAM_IN, STREAM_OUT
from glmexport.engine.core.cache import UnkeptCaches, run_graph, unkept_specs
from glmexport.engine.session import open_session
from glmexport.foundation.evidence import Deviation, Divergences
from glmexport.foundation.progress import Progress, Silent
from glmexport.foundation.target import Target
from glmexport.graph.build import build_part
from glmexport.lowering.pipeline import lower
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.reference.reference import Reference
from glmexport.results.record import badness
from glmexport.tuning.arithmetic import Variants
from glmexport.tuning.slices import units
from glmexport.validation.divergence import kl_divergence
from glmexport.validation.fidelity import Streamed, position_slices
from glmexport.validation.statistics import bounds, clustered_mean
from glmexport.validation.texts import EvaluationText


@dataclass(frozen=True)
class DocumentDivergence:
    """The divergences of one text, in nats, summed over its positions."""

    language: str
    positions: int
    original: float
    arithmetic: float


class ArithmeticStreams:
    """One quantized model in several kinds of arithmetic over ``texts``, with caches in floats or in codes.

    Args:
        name: the name of its steps in ``work``.
        weights: the weights of its recipe, which are read block by block.
        reference: the same model's, for what the graph does not compute: embedding and rotary tables.
        variants: the kinds of arithmetic that the graph is lowered for.
        texts: the texts that it is asked about.
        work: the directory that keeps finished blocks.
        threads: the number for the sessions.
        cache_text: token ids that the scales of quantized caches are calibrated on.
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        reference: Reference,
        variants: Variants,
        texts: Sequence[EvaluationText],
        work: WorkDirectory,
        threads: int,
        cache_text: Sequence[Sequence[int]] = (),
    ) -> None:
        self._name = name
        self._weights = weights
        self._reference = reference
        self._variants = variants
        self._texts = texts
        self._work = work
        self._threads = threads
        self._units = units(weights.architecture)
        self._steps = [f"{name}.{index:03d}" for index in range(len(self._units) + 1)]
        #: The texts, and after them the text that caches are calibrated on, which passes through every variant too.
        self._sequences = [*(text.ids for text in texts), *(torch.tensor(list(ids)) for ids in cache_text)]
        self._spans = list(pairwise(accumulate((len(ids) for ids in self._sequences), initial=0)))
        self._tables = reference.rotary_tables(max(len(ids) for ids in self._sequences))

    def divergences(self, original: Streamed, progress: Progress) -> dict[str, list[DocumentDivergence]]:
        """Return every variant's divergences from the original's answers and from the exact variant's, text by text."""
        found = self._work.record(self._name)
        if found is None:
            self._run(progress)
            measured = self._compare(original, progress)
            note = {key: [vars(document) for document in documents] for key, documents in measured.items()}
            self._work.commit(self._name, {}, note)
            for step in self._steps:
                self._work.forget(step)
            found = {"note": note}
        return {key: [DocumentDivergence(**values) for values in rows] for key, rows in found["note"].items()}

    def _run(self, progress: Progress) -> None:
        """Commit the streams after every unit that is not committed yet."""
        done = next((index for index in range(len(self._steps), 0, -1) if self._is_there(self._steps[index - 1])), 0)
        if not done:
            embedded = self._embedded(torch.cat(self._sequences))[:, None]
            self._work.commit(self._steps[0], {}, {}, {key: iter([embedded]) for key in self._variants.targets})
            done = 1
        with progress.track(f"Divergence: {self._name}", len(self._units)) as track:
            track.advance(done - 1)
            for index in range(done, len(self._steps)):
                before = self._steps[index - 1]
                with tempfile.TemporaryDirectory(dir=self._work.path) as folder:
                    self._write(self._units[index - 1], Path(folder))
                    for key in self._variants.floats:
                        self._calibrate(key, self._units[index - 1], Path(folder), before)
                    streams = {key: self._through(key, Path(folder), before) for key in self._variants.targets}
                    self._work.commit(self._steps[index], {}, {}, streams)
                self._work.drop_activations(before)
                track.advance(1, f"block {self._units[index - 1][-1].index}")

    def _is_there(self, step: str) -> bool:
        return self._work.record(step) is not None and all(
            self._work.has_activations(step, key) for key in self._variants.targets
        )

    def _embedded(self, ids: Tensor) -> Tensor:
        """Return the embedded ``ids``, [rows, D] fp32: looking up is the same in every arithmetic."""
        key = self._weights.architecture.embedding
        if self._weights.form(key) is None:
            return self._reference.embed(ids)
        return self._weights.quantized(key).lookup(ids)

    def _write(self, layers: Sequence[DecoderLayer], folder: Path) -> None:
        """Write a graph for each variant; weights that they have in common are made and stored once."""
        graphs = {
            f"{key}.onnx": lower(
                build_part(self._weights.architecture, layers, target.graph), target, self._weights, self._tables
            )
            for key, target in self._variants.targets.items()
        }
        write_graphs(graphs, folder, Silent())

    def _through(self, key: str, folder: Path, before: str) -> Iterator[Tensor]:
        """Return the rows [length, 1, D] of every text after the graph in ``folder``."""
        part = GraphPart(folder / f"{key}.onnx", self._variants.targets[key], self._threads)
        for ids, span in zip(self._sequences, self._spans, strict=True):
            yield part.run(STREAM_OUT, ids, self._rows(before, key, span)).transpose(0, 1)

    def _calibrate(self, key: str, layers: Sequence[DecoderLayer], folder: Path, before: str) -> None:
        """Put scales into the graph of a variant with a quantized cache."""
        floats, path = self._variants.floats[key], folder / f"{key}.onnx"
        part = GraphPart(folder / f"{floats}.onnx", self._variants.targets[floats], self._threads)
        gauges = CacheGauges(layers, self._variants.targets[key].graph)
        first = len(self._texts)
        for turn in range(gauges.passes):
            for ids, span in zip(self._sequences[first:], self._spans[first:], strict=True):
                caches = part.all(gauges.outputs, ids, self._rows(before, floats, span))
                gauges.see(turn, (cached[0] for cached in caches))
        model = ir.load(path)
        set_scales(model, gauges.scales())
        ir.save(model, path)

    def _rows(self, step: str, key: str, span: tuple[int, int]) -> Tensor:
        """Return the stream of one text, [1, length, D]."""
        shape = (self._spans[-1][1], 1, self._weights.architecture.hidden_size)
        return self._work.activations(step, key, shape).read(*span).transpose(0, 1)

    def _compare(self, original: Streamed, progress: Progress) -> dict[str, list[DocumentDivergence]]:
        measured: dict[str, list[DocumentDivergence]] = {key: [] for key in self._variants.targets}
        last = self._steps[-1]
        with tempfile.TemporaryDirectory(dir=self._work.path) as folder:
            self._write((), Path(folder))
            heads = {
                key: GraphPart(Path(folder) / f"{key}.onnx", target, self._threads)
                for key, target in self._variants.targets.items()
            }
            with progress.track(f"Divergence: {self._name}, head", len(self._texts)) as track:
                # The text that caches were calibrated on is left out.
                for index, (text, span) in enumerate(zip(self._texts, self._spans, strict=False)):

                    def logits(key: str, text: EvaluationText = text, span: tuple[int, int] = span) -> Tensor:
                        return heads[key].run(LOGITS, text.ids, self._rows(last, key, span))[0, text.prefix - 1 : -1]

                    exact = logits(self._variants.exact)
                    for key in self._variants.targets:
                        given = exact if key == self._variants.exact else logits(key)
                        measured[key].append(
                            DocumentDivergence(
                                language=text.language,
                                positions=text.positions,
                                original=float(original.divergence(index, given).kl.double().sum()),
                                arithmetic=_sum_of_kl(exact, given),
                            )
                        )
                    track.advance(1, text.language)
        return measured


class GraphPart:
    """A graph of some blocks, or of the head, with empty caches before every text."""

    def __init__(self, graph: Path, target: Target, threads: int) -> None:
        self._session: onnxruntime.InferenceSession = open_session(graph, target.provider, threads)
        inputs = {value.name for value in self._session.get_inputs()}
        self._given = inputs & {INPUT_IDS, ATTENTION_MASK, STREAM_IN}
        self._caches = unkept_specs(self._session, self._given)

    def run(self, output: str, ids: Tensor, stream: Tensor) -> Tensor:
        """Return an ``output`` for the ``stream`` [1, length, D] of token ``ids`` [length]."""
        return torch.from_numpy(self.all([output], ids, stream)[0])

    def all(self, outputs: list[str], ids: Tensor, stream: Tensor) -> list[NDArray[np.float32]]:
        """Return several outputs."""
        length = len(ids)
        given: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids[None].numpy(),
            ATTENTION_MASK: np.ones((1, length), np.int64),
            STREAM_IN: stream.contiguous().numpy(),
        }
        caches = UnkeptCaches(self._caches, 1)
        caches.reserve(length)
        return run_graph(self._session, {name: given[name] for name in self._given}, outputs, caches)


def _sum_of_kl(exact: Tensor, given: Tensor) -> float:
    """Return the sum of KL(exact || given) over the positions of logits [positions, V], in nats."""
    if exact is given:
        return 0.0
    slices = position_slices(len(exact))
    return sum(
        float(kl_divergence(exact[each].double().log_softmax(-1), given[each].double().log_softmax(-1)).sum())
        for each in slices
    )


def summarized(documents: Sequence[DocumentDivergence], confidence: float) -> Divergences:
    """Return the divergences over all languages, with documents as the sample."""
    return Divergences(
        original=_deviation([(each.language, each.positions, each.original) for each in documents], confidence),
        arithmetic=_deviation([(each.language, each.positions, each.arithmetic) for each in documents], confidence),
        positions=sum(each.positions for each in documents),
    )


def _deviation(rows: Sequence[tuple[str, int, float]], confidence: float) -> Deviation:
    estimate = clustered_mean([total for *_, total in rows], [count for _, count, _ in rows], "positive")
    upper = bounds(estimate, confidence)[1]
    languages: dict[str, tuple[float, int]] = {}
    for language, count, total in rows:
        before = languages.get(language, (0.0, 0))
        languages[language] = before[0] + total, before[1] + count
    means = {language: total / count for language, (total, count) in languages.items()}
    worst = max(means, key=lambda language: badness(means[language]))
    return Deviation(
        mean=estimate.value, upper=upper if np.isfinite(upper) else None, worst=means[worst], language=worst
    )
