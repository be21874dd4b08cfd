"""A job's matrices are quantized in their formats: against a Hessian, to nearest, or as the checkpoint stores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from glmexport.architecture.description import Linear
from glmexport.formats.nearest import nearest_without_text
from glmexport.formats.plan import FormatPlan, stored_formats
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization.goal import Correction
from glmexport.quantization.job import SOLVE, QuantizationJob
from glmexport.quantization.moments import Measured
from glmexport.quantization.part import QuantizedPart
from glmexport.quantization.problem import Problem
from glmexport.quantization.ranks import ALONE, Parcel, Ranks
from glmexport.quantization.record import solved_record, unmeasured
from glmexport.quantization.solve import RowBlock, Solution, join_rows, solve_rows
from glmexport.quantization.stored import stored_linear


class Quantizer:
    """Quantizes the matrices of ``job``; ``allocated`` has the formats that a budget gave, by weight key."""

    def __init__(self, job: QuantizationJob, allocated: Mapping[str, Format]) -> None:
        self.job = job
        self.plan = FormatPlan.of(job.architecture, job.recipe, stored_formats(job.checkpoint)).chosen(allocated)

    def solve(
        self,
        linears: tuple[Linear, ...],
        layer: int | None,
        measured: Measured,
        solver: Solver | None = None,
        tokens: float | None = None,
        whole: bool = False,
    ) -> QuantizedPart:
        """Quantize the ``linears`` of one tap against what was measured there.

        Args:
            linears: matrices of one format that read the same.
            layer: the decoder layer that they belong to; None for the lm_head.
            measured: its Hessian is used up.
            solver: how to solve; by default as the recipe says.
            tokens: how many positions the Hessian rests on; by default all that count.
            whole: whether this rank alone solves all rows; by default all ranks share them, and call this together.
        """
        job = self.job
        form = self.plan.form(linears[0].weight)
        assert form is not None and job.calibration is not None
        solver = solver or job.recipe.solver
        tokens = job.calibration.effective_tokens if tokens is None else tokens
        with job.stopwatch.running(SOLVE):
            problem = Problem.prepare(measured.hessian, form, solver, measured.sample, tokens=tokens, consume=True)
            # What is solved of the goal is solved once for all matrices of the tap.
            goal = problem.correction(measured.goal)
        part = QuantizedPart(largest=measured.largest)
        with job.stopwatch.running(SOLVE):
            solutions = self._solutions(linears, problem, form, solver, goal, whole=whole)
        for linear, solution in zip(linears, solutions, strict=True):
            remarks = (f"{linear.key}: {solution.fallback}.",) if solution.fallback else ()
            fold = job.checkpoint.folds.get(linear.weight)
            folded = fold is not None and fold.columns is not None
            record = solved_record(linear, layer, solution, tokens, folded=folded)
            part += QuantizedPart({linear.weight: solution.linear}, (record,), remarks=remarks)
        return part

    def remark(self, part: QuantizedPart) -> None:
        """Tell people what there is to say about ``part``."""
        for remark in part.remarks:
            self.job.progress.remark(remark)

    def _solutions(
        self,
        linears: Sequence[Linear],
        problem: Problem,
        form: Format,
        solver: Solver,
        goal: Correction | None,
        *,
        whole: bool,
    ) -> list[Solution]:
        """Return the solution of each of ``linears``, of whose blocks of rows each rank solves some."""

        def solved(block: tuple[str, int, int]) -> Parcel:
            _, start, _ = block
            return solve_rows(self.job.rows(*block), start, problem, form, solver, goal).parcel()

        found: dict[str, list[RowBlock]] = {linear.weight: [] for linear in linears}
        blocks = [(key, *block) for key in found for block in self.job.blocks(key, whole=whole)]
        for (key, _, _), parcel in self._ranks(whole=whole).each(blocks, solved):
            found[key].append(RowBlock.received(form, parcel))
        return [join_rows(rows, problem, solver, goal) for rows in found.values()]

    def _ranks(self, *, whole: bool) -> Ranks:
        """Return who shares the rows of a matrix."""
        return ALONE if whole else self.job.ranks

    def round(self, linears: Iterable[Linear], layer: int | None, *, whole: bool = False) -> QuantizedPart:
        """Round ``linears`` to nearest, without any text; ``whole`` as for ``solve``."""
        part = QuantizedPart()
        for linear in linears:
            form = self.plan.form(linear.weight)
            assert form is not None
            matrix = self.rounded(linear.weight, form, whole=whole)
            part += QuantizedPart({linear.weight: matrix}, (unmeasured(linear.weight, layer, linear.part, matrix),))
        return part

    def keep_stored(self, linears: Iterable[Linear], layer: int | None) -> QuantizedPart:
        """Take over those of ``linears`` that the checkpoint stores quantized, code by code."""
        part = QuantizedPart()
        for linear in linears:
            matrix = self.stored(linear.weight)
            if matrix is not None:
                part += QuantizedPart({linear.weight: matrix}, (unmeasured(linear.weight, layer, linear.part, matrix),))
        return part

    def embedding(self) -> QuantizedPart:
        """Round the embedding to nearest, if it has a format."""
        key = self.job.architecture.embedding
        form = self.plan.form(key)
        if form is None:
            return QuantizedPart()
        matrix = self.rounded(key, form)
        return QuantizedPart({key: matrix}, (unmeasured(key, None, "embedding", matrix),))

    def rounded(self, key: str, form: Format, *, whole: bool = False) -> QuantizedLinear:
        """Return the matrix ``key`` rounded to nearest in the format ``form``; ``whole`` as for ``solve``."""
        searched = self.job.recipe.solver.scale_search

        def near(block: tuple[int, int]) -> Parcel:
            return RowBlock(nearest_without_text(self.job.rows(key, *block), form, searched=searched)).parcel()

        with self.job.stopwatch.running(SOLVE):
            parcels = self._ranks(whole=whole).each(self.job.blocks(key, whole=whole), near)
            return QuantizedLinear.concatenate([RowBlock.received(form, parcel).linear for _, parcel in parcels])

    def stored(self, key: str) -> QuantizedLinear | None:
        """Return the matrix ``key`` as the checkpoint stores it quantized.

        None if it is not, or the recipe does not keep such codes.
        """
        if not self.job.recipe.keeps_stored:
            return None
        return stored_linear(self.job.checkpoint, key, self.job.memory.chunk_weights)

    def expert_solver(self, key: str) -> Solver:
        """Return how the matrices of the expert with the gate and up projection ``key`` are solved."""
        solver = self.job.recipe.solver
        if key not in self.job.architecture.routed:
            return solver
        return solver.model_copy(update={"polish_rounds": solver.expert_polish_rounds})
