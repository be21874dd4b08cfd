"""Quantize a model one decoder block at a time: measure, solve, advance, commit.

Every Hessian is measured on the inputs that the linear will see in the finished bundle, with everything before it
already quantized (see ``streams``). Nothing larger than a block, one Hessian and its factor is ever in memory, and a
walk that is killed goes on after its last committed block.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from glmexport.architecture.description import Architecture, DecoderLayer, GatedMlp, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.bundle.records import AllocatedGroup, QuantizedMatrix
from glmexport.calibration.sequences import CalibrationSet
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.nearest import nearest_without_text
from glmexport.formats.plan import FormatPlan, stored_formats
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format, Recipe, Solver
from glmexport.quantization.decisions import ALLOCATION, FOLDS, allocated_groups, decide_folds, decide_formats
from glmexport.quantization.draft import round_draft
from glmexport.quantization.largest import Seen
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.mixture import Mixture
from glmexport.quantization.moments import Measured
from glmexport.quantization.problem import Problem
from glmexport.quantization.record import routed, solved_record, unmeasured
from glmexport.quantization.solve import gptq
from glmexport.quantization.steps import EMBEDDING, HEAD, block_step, draft_steps, expert_steps
from glmexport.quantization.store import Activations, WorkDirectory
from glmexport.quantization.stored import stored_linear
from glmexport.quantization.streams import Passage, Streams
from glmexport.reference.reference import CPU, Reference, Substitute


class Walk:
    """One pass through a checkpoint. ``calibration`` is None for recipes that need none.

    Everything is computed on ``device``; weights and activations come to it as they are needed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        recipe: Recipe,
        calibration: CalibrationSet | None,
        work: WorkDirectory,
        memory: MemoryPlan,
        progress: Progress,
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.recipe = recipe
        self.calibration = calibration
        self.work = work
        self.memory = memory
        self.progress = progress
        self.device = device
        self.streams = self._streams()
        self.plan = FormatPlan.of(architecture, recipe, stored_formats(checkpoint))
        self.steps = [EMBEDDING, *(block_step(layer.index) for layer in architecture.layers), HEAD]
        #: What is committed with each step, itself included.
        self._within = {step: [step] for step in self.steps}
        if recipe.quantizes_linears:
            for layer in architecture.layers:
                self._within[block_step(layer.index)] += expert_steps(layer)
        self._routed = architecture.routed

    @property
    def parts(self) -> list[str]:
        """Everything that is committed, experts included, in the order of the model."""
        return [part for step in self.steps for part in self._within[step]]

    @property
    def draft_parts(self) -> list[str]:
        """What is committed of the layer that predicts further ahead."""
        return list(draft_steps(self.architecture.token_prediction))

    def run(self) -> None:
        """Commit every step that is not committed yet."""
        self.prepare()
        first = self._resume_at()
        if first:
            self.progress.remark(f"Resuming after {self.steps[first - 1]} ({first} of {len(self.steps)} steps done).")
        with self.progress.track("Quantizing", len(self.steps)) as track:
            track.advance(first)
            for index in range(first, len(self.steps)):
                self._step(index)
                track.advance(1, self.steps[index])
        self.work.drop_scratch()
        if self.architecture.token_prediction:
            draft = self.architecture.token_prediction
            round_draft(draft, self.plan, self.work, self.progress, self._nearest_one, self._stored_one)

    def prepare(self) -> None:
        """Decide what holds for all steps: which scales are folded, and under a budget every matrix's format."""
        if self.streams and self.recipe.linears and self.recipe.solver.fold_scales:
            form = self.recipe.linear(mixture=bool(self._routed), routed=False)
            assert form is not None
            folds = decide_folds(self.streams, form, self.memory, self.progress)
            self.checkpoint = self.checkpoint.folded(folds)
            self.streams = self._streams()
        if self.streams and self.recipe.budget:
            self.plan = self.plan.chosen(decide_formats(self.streams, self.recipe, self.memory, self.progress))

    def records(self) -> tuple[list[QuantizedMatrix], float]:
        """How every matrix was quantized, in the order of the walk, and the seconds it took in all."""
        records, seconds = self._records(self.parts)
        before = [self.work.record(step) for step in (FOLDS, ALLOCATION)]
        return records, seconds + sum(record["note"]["seconds"] for record in before if record)

    def draft_records(self) -> list[QuantizedMatrix]:
        """The same of the matrices that only drafts are made with."""
        return self._records(self.draft_parts)[0]

    def _records(self, steps: Iterable[str]) -> tuple[list[QuantizedMatrix], float]:
        records, seconds = [], 0.0
        for step in steps:
            note = (self.work.record(step) or {"note": {}})["note"]
            records += [QuantizedMatrix.model_validate(record) for record in note.get("linears", [])]
            seconds += note.get("seconds", 0.0)
        return records, seconds

    def largest_activation(self) -> Seen | None:
        """The largest number that a matrix or a norm read of the calibration text; None: no text was run.

        It is of the quantized model, over all positions. What matrices give is seen where the next one reads it.
        """
        notes = [(self.work.record(step) or {"note": {}})["note"].get("largest") for step in self.steps]
        return max((Seen(*found) for found in notes if found), default=None)

    def allocation(self) -> tuple[AllocatedGroup, ...]:
        """What the budget's bits were given to, in the order of the model; nothing for a recipe without one."""
        return allocated_groups(self.work, self.architecture, self.recipe)

    def _resume_at(self) -> int:
        """Index of the first step to do: the one after the last committed step whose activations are there."""
        done = 0
        for step in self.steps:
            if any(self.work.record(part) is None for part in self._within[step]):
                break
            done += 1
        if done == len(self.steps) or self.streams is None:
            return done
        names = self.streams.names
        while done and not all(self.work.has_activations(self.steps[done - 1], name) for name in names):
            done -= 1
        return done

    def _step(self, index: int) -> None:
        started = time.monotonic()
        step = self.steps[index]
        solved: dict[str, QuantizedLinear] = {}
        records: list[QuantizedMatrix] = []
        activations: dict[str, Iterator[Tensor] | Activations] = {}
        elsewhere = 0.0
        if self.streams:
            # What trials of formats saw is of other weights.
            self.streams.largest.take()
        if step == EMBEDDING:
            solved = self._embedding(records)
            if self.streams:
                activations = self.streams.embedded(solved.get(self.architecture.embedding))
        elif step == HEAD:
            solved = self._head(records)
        else:
            layer = self.architecture.layers[index - 1]
            passage = self.streams.enter(self.steps[index - 1], layer) if self.streams else None
            solved = self._block(layer, passage, records)
            if isinstance(layer.mlp, MixtureOfExperts) and self.recipe.quantizes_linears:
                beginning = time.monotonic()
                activations = self._mixture(layer, layer.mlp, passage, solved)
                elsewhere = time.monotonic() - beginning
            elif passage:
                activations = passage.outputs(_dequantized(solved))
        seconds = time.monotonic() - started - elsewhere
        largest = self.streams.largest.take() if self.streams else None
        note = {"linears": [record.model_dump() for record in records], "seconds": seconds, "largest": largest}
        self.work.commit(step, solved, note, activations)
        if index:
            self.work.drop_activations(self.steps[index - 1])

    def _stored_one(self, linear: Linear) -> QuantizedLinear | None:
        if not self.recipe.keeps_stored:
            return None
        return stored_linear(self.checkpoint, linear.weight, self.memory.chunk_weights)

    def _streams(self) -> Streams | None:
        if self.calibration is None:
            return None
        return Streams(
            Reference(self.checkpoint, self.architecture, self.device),
            self.calibration,
            self.work,
            asymmetric=self.recipe.solver.asymmetric,
            batch_tokens=self.memory.batch_tokens,
        )

    def _form(self, key: str) -> Format | None:
        return self.plan.form(key)

    def _embedding(self, records: list[QuantizedMatrix]) -> dict[str, QuantizedLinear]:
        key = self.architecture.embedding
        form = self._form(key)
        if form is None:
            return {}
        linear = self._nearest(key, self.architecture.vocabulary_size, self.architecture.hidden_size, form)
        records.append(unmeasured(key, None, "embedding", linear))
        return {key: linear}

    def _block(
        self, layer: DecoderLayer, passage: Passage | None, records: list[QuantizedMatrix]
    ) -> dict[str, QuantizedLinear]:
        solved: dict[str, QuantizedLinear] = {}
        mixed = isinstance(layer.mlp, MixtureOfExperts)
        if self.recipe.keeps_stored:
            return self._stored(layer.attention.linears if mixed else layer.linears, layer.index, records)
        for tap, linears in layer.taps.items():
            form = self._form(linears[0].weight)
            if form is None or (mixed and linears[0] not in layer.attention.linears):
                continue
            if passage is None:
                solved |= self._unmeasured(linears, layer.index, records)
                continue
            measured = passage.measure(tap, _dequantized(solved))
            solved |= self._solve(linears, layer.index, measured, form, self.recipe.solver, records)
        return solved

    def _mixture(
        self,
        layer: DecoderLayer,
        experts: MixtureOfExperts,
        passage: Passage | None,
        solved: dict[str, QuantizedLinear],
    ) -> dict[str, Iterator[Tensor] | Activations]:
        """Commit one expert after the other, the shared one last, and return what the next layer reads."""
        mixture = None
        if passage:
            passage.move_on(_dequantized(solved))
            mixture = Mixture(passage, experts, self.memory.batch_tokens)
        for step, mlp in sorted(expert_steps(layer).items(), key=lambda item: item[1] is experts.shared):
            if self.work.record(step) is None:
                self._expert(step, layer.index, mlp, mixture)
            if mixture:
                mixture.add(mlp, {key: self.work.linear(step, key) for key in self.work.formats(step)})
        return mixture.outputs() if mixture else {}

    def _expert(self, step: str, layer: int, mlp: GatedMlp, mixture: Mixture | None) -> None:
        started = time.monotonic()
        records: list[QuantizedMatrix] = []
        solved: dict[str, QuantizedLinear] = {}
        solver = self.recipe.solver
        if mlp.gate_up.weight in self._routed:
            solver = solver.model_copy(update={"polish_rounds": solver.expert_polish_rounds})
        if self.recipe.keeps_stored:
            solved = self._stored(mlp.linears, layer, records)
        elif mixture is None:
            solved = self._unmeasured(mlp.linears, layer, records)
        else:
            for linear in mlp.linears:
                form = self._form(linear.weight)
                assert form is not None
                found = mixture.measure(mlp, linear, solved.get(mlp.gate_up.weight) if solved else None)
                solved |= self._solve((linear,), layer, found.measured, form, solver, records, tokens=found.tokens)
                records[-1] = routed(records[-1], linear, found.chosen, found.own_tokens)
        note = {"linears": [record.model_dump() for record in records], "seconds": time.monotonic() - started}
        self.work.commit(step, solved, note)

    def _unmeasured(
        self, linears: Iterable[Linear], layer: int | None, records: list[QuantizedMatrix]
    ) -> dict[str, QuantizedLinear]:
        """``linears`` rounded to nearest, without any text."""
        solved = {}
        for linear in linears:
            form = self._form(linear.weight)
            assert form is not None
            solved[linear.weight] = self._nearest_one(linear, form)
            records.append(unmeasured(linear.weight, layer, linear.part, solved[linear.weight]))
        return solved

    def _stored(
        self, linears: Iterable[Linear], layer: int | None, records: list[QuantizedMatrix]
    ) -> dict[str, QuantizedLinear]:
        """Those of ``linears`` that the checkpoint stores quantized."""
        kept = {}
        for linear in linears:
            stored = self._stored_one(linear)
            if stored is not None:
                kept[linear.weight] = stored
                records.append(unmeasured(linear.weight, layer, linear.part, stored))
        return kept

    def _head(self, records: list[QuantizedMatrix]) -> dict[str, QuantizedLinear]:
        head = self.architecture.lm_head
        if self.recipe.keeps_stored and head.weight in self.checkpoint.quantized:
            return self._stored([head], None, records)
        form = self._form(head.weight)
        if form is None or self.architecture.tied:
            # A tied head is the embedding, whose codes are fixed before any activation exists.
            return {}
        if self.streams is None:
            linear = self._nearest_one(head, form)
            records.append(unmeasured(head.weight, None, head.part, linear))
            return {head.weight: linear}
        # At 8 bits the sweep already leaves next to nothing, and the head has the most rows of all.
        rounds = 0 if form.bits == 8 else self.recipe.solver.polish_rounds
        solver = self.recipe.solver.model_copy(update={"polish_rounds": rounds})
        return self._solve((head,), None, self.streams.measure_head(self.steps[-2], head), form, solver, records)

    def _solve(
        self,
        linears: tuple[Linear, ...],
        layer: int | None,
        measured: Measured,
        form: Format,
        solver: Solver,
        records: list[QuantizedMatrix],
        tokens: float | None = None,
    ) -> dict[str, QuantizedLinear]:
        """Quantize the ``linears`` of one tap, whose Hessian is used up; it rests on ``tokens``, or on all of them."""
        assert self.calibration is not None
        tokens = self.calibration.effective_tokens if tokens is None else tokens
        problem = Problem.of(measured.hessian, form, solver, measured.sample, tokens=tokens, consume=True)
        solved = {}
        for linear in linears:
            chunks = self._chunks(linear.weight, linear.out_features, linear.in_features)
            solution = gptq(chunks, problem, form, solver, measured.goals.get(linear.weight))
            if solution.fallback:
                self.progress.remark(f"{linear.key}: {solution.fallback}.")
            solved[linear.weight] = solution.linear
            fold = self.checkpoint.folds.get(linear.weight)
            folded = fold is not None and fold.columns is not None
            records.append(solved_record(linear, layer, solution, tokens, folded=folded))
        return solved

    def _nearest_one(self, linear: Linear, form: Format) -> QuantizedLinear:
        return self._nearest(linear.weight, linear.out_features, linear.in_features, form)

    def _nearest(self, key: str, rows: int, columns: int, form: Format) -> QuantizedLinear:
        chunks, searched = self._chunks(key, rows, columns), self.recipe.solver.scale_search
        return QuantizedLinear.concatenate([nearest_without_text(chunk, form, searched=searched) for chunk in chunks])

    def _chunks(self, key: str, rows: int, columns: int) -> Iterator[Tensor]:
        count = max(64, self.memory.chunk_weights // columns)
        for start in range(0, rows, count):
            yield self.checkpoint.rows(key, start, min(start + count, rows)).to(self.device)


def _dequantized(solved: dict[str, QuantizedLinear]) -> Substitute:
    def weight(key: str) -> Tensor | None:
        linear = solved.get(key)
        return None if linear is None else linear.dequantize()

    return weight
