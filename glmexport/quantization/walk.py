"""Quantize a model one decoder block at a time: measure, solve, advance, commit.

The stream of activations is that of the quantized model: every Hessian is measured on the inputs that the linear
will see in the finished bundle, with everything before it already quantized. Nothing larger than a block, one
Hessian and its factor is ever in memory, and a walk that is killed goes on after its last committed block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from glmexport.architecture import Architecture, DecoderLayer, Linear, Reference
from glmexport.architecture.reference import Substitute
from glmexport.calibration import CalibrationSet, Hessian
from glmexport.checkpoint import Checkpoint
from glmexport.progress import Progress
from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.solve import Problem, Solution, gptq, round_to_nearest
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.stored import stored_linear
from glmexport.recipe import Format, Recipe

EMBEDDING, HEAD = "embedding", "head"


def block_step(index: int) -> str:
    """Name under which decoder layer ``index`` is committed."""
    return f"block_{index:03d}"


@dataclass(frozen=True)
class LinearRecord:
    """How one matrix was quantized; errors are relative, on the calibration inputs. None: not measured."""

    key: str
    layer: int | None
    part: str
    form: dict[str, object]
    bits_per_weight: float
    relative_error: float | None
    round_to_nearest_error: float | None
    damping: float | None
    dead_columns: int
    effective_tokens_per_column: float | None
    fallback: str | None


class Walk:
    """One pass through a checkpoint. ``calibration`` is None for recipes that need none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        recipe: Recipe,
        calibration: CalibrationSet | None,
        work: WorkDirectory,
        memory: MemoryPlan,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.recipe = recipe
        self.calibration = calibration
        self.work = work
        self.memory = memory
        self.progress = progress
        self.reference = Reference(checkpoint, architecture) if calibration else None
        self.steps = [EMBEDDING, *(block_step(layer.index) for layer in architecture.layers), HEAD]

    def run(self) -> None:
        """Commit every step that is not committed yet."""
        first = self._resume_at()
        if first:
            self.progress.remark(f"Resuming after {self.steps[first - 1]} ({first} of {len(self.steps)} steps done).")
        with self.progress.track("Quantizing", len(self.steps)) as track:
            track.advance(first)
            for index in range(first, len(self.steps)):
                self._step(index)
                track.advance(1, self.steps[index])

    def records(self) -> tuple[list[LinearRecord], float]:
        """How every matrix was quantized, in the order of the walk, and the seconds it took in all."""
        records, seconds = [], 0.0
        for step in self.steps:
            note = (self.work.record(step) or {"note": {}})["note"]
            records += [LinearRecord(**record) for record in note.get("linears", [])]
            seconds += note.get("seconds", 0.0)
        return records, seconds

    def _resume_at(self) -> int:
        """Index of the first step to do: the one after the last committed step whose activations are there."""
        done = 0
        for step in self.steps:
            if self.work.record(step) is None:
                break
            done += 1
        if done == len(self.steps) or self.calibration is None:
            return done
        while done and not (self.work.path / f"{self.steps[done - 1]}.activations").is_file():
            done -= 1
        return done

    def _step(self, index: int) -> None:
        started = time.monotonic()
        step = self.steps[index]
        solved: dict[str, QuantizedLinear] = {}
        records: list[LinearRecord] = []
        stream: Iterator[Tensor] | None = None
        if step == EMBEDDING:
            solved = self._embedding(records)
            stream = self._embedded(solved) if self.calibration else None
        elif step == HEAD:
            solved = self._head(records)
        else:
            layer = self.architecture.layers[index - 1]
            solved = self._block(layer, records)
            stream = self._advance(layer, solved) if self.calibration else None
        note = {"linears": [asdict(record) for record in records], "seconds": time.monotonic() - started}
        self.work.commit(step, solved, note, stream)
        if index and self.calibration:
            self.work.drop_activations(self.steps[index - 1])

    def _embedding(self, records: list[LinearRecord]) -> dict[str, QuantizedLinear]:
        form = self.recipe.embedding
        if form is None:
            return {}
        key = self.architecture.embedding
        linear = self._nearest(key, self.architecture.vocabulary_size, self.architecture.hidden_size, form)
        records.append(_unmeasured(key, None, "embedding", linear))
        return {key: linear}

    def _block(self, layer: DecoderLayer, records: list[LinearRecord]) -> dict[str, QuantizedLinear]:
        form = self.recipe.linears
        solved: dict[str, QuantizedLinear] = {}
        if self.recipe.keeps_stored:
            return self._stored(layer.linears, layer.index, records)
        if form is None:
            return solved
        for tap, linears in layer.taps.items():
            if self.calibration is None:
                for linear in linears:
                    solved[linear.weight] = self._nearest(linear.weight, linear.out_features, linear.in_features, form)
                    records.append(_unmeasured(linear.weight, layer.index, linear.part, solved[linear.weight]))
                continue
            hessian = self._measure(layer, tap, solved)
            problem, tokens = Problem.of(hessian.matrix, form, self.recipe.solver, consume=True), hessian.tokens
            del hessian
            for linear in linears:
                solution = self._solve(linear, problem, form, self.recipe)
                solved[linear.weight] = solution.linear
                records.append(self._measured(linear, layer.index, solution, tokens))
        return solved

    def _stored(
        self, linears: Iterable[Linear], layer: int | None, records: list[LinearRecord]
    ) -> dict[str, QuantizedLinear]:
        """Those of ``linears`` that the checkpoint stores quantized."""
        kept = {}
        for linear in linears:
            stored = stored_linear(self.checkpoint, linear.weight, self.memory.chunk_weights)
            if stored is not None:
                kept[linear.weight] = stored
                records.append(_unmeasured(linear.weight, layer, linear.part, stored))
        return kept

    def _head(self, records: list[LinearRecord]) -> dict[str, QuantizedLinear]:
        form, head = self.recipe.lm_head, self.architecture.lm_head
        if self.recipe.keeps_stored and head.weight in self.checkpoint.quantized:
            return self._stored([head], None, records)
        if form is None or self.architecture.tied:
            # A tied head is the embedding, whose codes are fixed before any activation exists.
            return {}
        if self.calibration is None or self.reference is None:
            linear = self._nearest(head.weight, head.out_features, head.in_features, form)
            records.append(_unmeasured(head.weight, None, head.part, linear))
            return {head.weight: linear}
        hessian = Hessian(head.in_features)
        prefix, weights = self.calibration.prefix, self.calibration.weights()
        for start, stop, hidden in self._stream(self.steps[-2]):
            hessian.add(self.reference.final_norm(hidden)[:, prefix:], weights[start:stop])
        problem = Problem.of(hessian.matrix, form, self.recipe.solver, consume=True)
        # At 8 bits the sweep already leaves next to nothing, and the head has the most rows of all.
        plain = replace_solver(self.recipe, polish_rounds=0) if form.bits == 8 else self.recipe
        solution = self._solve(head, problem, form, plain)
        records.append(self._measured(head, None, solution, hessian.tokens))
        return {head.weight: solution.linear}

    def _measure(self, layer: DecoderLayer, tap: str, solved: dict[str, QuantizedLinear]) -> Hessian:
        """Hessian of ``tap``, with the linears before it in the block already quantized."""
        assert self.reference is not None and self.calibration is not None
        hessian = Hessian(layer.taps[tap][0].in_features)
        block = self.reference.block(layer, _dequantized(solved))
        positions = self.reference.position_embeddings(self.calibration.ids.shape[1])
        prefix, weights = self.calibration.prefix, self.calibration.weights()
        for start, stop, hidden in self._stream(self._before(layer)):
            hessian.add(block.tap(tap, hidden, positions)[:, prefix:], weights[start:stop])
        return hessian

    def _advance(self, layer: DecoderLayer, solved: dict[str, QuantizedLinear]) -> Iterator[Tensor]:
        """The quantized block's outputs, which the next block reads."""
        assert self.reference is not None and self.calibration is not None
        block = self.reference.block(layer, _dequantized(solved))
        positions = self.reference.position_embeddings(self.calibration.ids.shape[1])
        for _, _, hidden in self._stream(self._before(layer)):
            yield block.forward(hidden, positions)

    def _embedded(self, solved: dict[str, QuantizedLinear]) -> Iterator[Tensor]:
        assert self.reference is not None and self.calibration is not None
        table = solved.get(self.architecture.embedding)
        for ids in torch.split(self.calibration.ids, self._batch()):
            if table is None:
                yield self.reference.embed(ids)
            else:
                yield table.lookup(ids)

    def _stream(self, step: str) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, hidden states [stop - start, length, hidden]) of the activations committed with ``step``."""
        assert self.calibration is not None
        count, length = self.calibration.ids.shape
        activations = self.work.activations(step, (count, length, self.architecture.hidden_size))
        for start in range(0, count, self._batch()):
            stop = min(start + self._batch(), count)
            yield start, stop, activations.read(start, stop)

    def _batch(self) -> int:
        assert self.calibration is not None
        return max(1, self.memory.batch_tokens // self.calibration.ids.shape[1])

    def _before(self, layer: DecoderLayer) -> str:
        return self.steps[layer.index]

    def _solve(self, linear: Linear, problem: Problem, form: Format, recipe: Recipe) -> Solution:
        chunks = self._chunks(linear.weight, linear.out_features, linear.in_features)
        solution = gptq(chunks, problem, form, recipe.solver)
        if solution.fallback:
            self.progress.remark(f"{linear.key}: {solution.fallback}.")
        return solution

    def _nearest(self, key: str, rows: int, columns: int, form: Format) -> QuantizedLinear:
        # Without a Hessian every column counts the same; at 8 bits the search finds nothing to gain.
        searched = self.recipe.solver.scale_search and form.bits < 8
        importance = torch.ones(columns) if searched else None
        chunks = self._chunks(key, rows, columns)
        return QuantizedLinear.concatenate([round_to_nearest(chunk, form, importance) for chunk in chunks])

    def _chunks(self, key: str, rows: int, columns: int) -> Iterator[Tensor]:
        count = max(64, self.memory.chunk_weights // columns)
        for start in range(0, rows, count):
            yield self.checkpoint.rows(key, start, min(start + count, rows))

    def _measured(self, linear: Linear, layer: int | None, solution: Solution, tokens: int) -> LinearRecord:
        failed = math.isnan(solution.relative_error)
        return LinearRecord(
            key=linear.weight,
            layer=layer,
            part=linear.part,
            form=solution.linear.form.model_dump(),
            bits_per_weight=solution.linear.bits_per_weight,
            relative_error=None if failed else solution.relative_error,
            round_to_nearest_error=None if failed else solution.round_to_nearest_error,
            damping=None if failed else solution.damping,
            dead_columns=solution.dead_columns,
            effective_tokens_per_column=tokens / linear.in_features,
            fallback=solution.fallback,
        )


def replace_solver(recipe: Recipe, *, polish_rounds: int) -> Recipe:
    """``recipe`` with another number of polish rounds."""
    return recipe.model_copy(update={"solver": recipe.solver.model_copy(update={"polish_rounds": polish_rounds})})


def _unmeasured(key: str, layer: int | None, part: str, linear: QuantizedLinear) -> LinearRecord:
    return LinearRecord(
        key, layer, part, linear.form.model_dump(), linear.bits_per_weight, None, None, None, 0, None, None
    )


def _dequantized(solved: dict[str, QuantizedLinear]) -> Substitute:
    def weight(key: str) -> Tensor | None:
        linear = solved.get(key)
        return None if linear is None else linear.dequantize()

    return weight
