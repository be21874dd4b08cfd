"""The problem that the linears of one tap have in common, and the cost of an error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.foundation.recipe import Format, Solver
from glmexport.quantization.factor import Factor, factorize
from glmexport.quantization.goal import Correction, Goal, Sample
from glmexport.quantization.order import ColumnOrder, column_order

#: Number of standard errors by which held-out text has to prefer one result. Where the errors of the matrices before it
#: are much larger than its own, a row's cost is mostly chance: on the demo 29 of 20,736 rows rounded to nearest cost up
#: to 3 % less on 2,040 held-out positions, though they miss the goal on the calibration text by 3 to 15 times as much.
_SURE = 3.0
#: Fewest effective tokens a column to which anything is fitted: fewer show at most one in sixteen directions of the
#: input, and held-out text of the same kind does not tell what a fit to them does to the others. On synthetic inputs of
#: a flat spectrum a fit to so few gains at most a fifth on text of their kind, and loses up to two fifths on any other.
LEAST_TOKENS = 1 / 16


@dataclass(frozen=True)
class Problem:
    """The order of the columns, the factored Hessian, and held-out text whose columns are in sweep order.

    Without a factor everything is rounded to nearest, and ``refusal`` says why.
    """

    order: ColumnOrder
    factor: Factor | None
    #: The weight of each column's squared error where it is rounded to nearest, [K] in stored order.
    importance: Tensor
    sample: Sample | None = None
    refusal: str | None = None

    @classmethod
    def prepare(
        cls,
        hessian: Tensor,
        form: Format,
        solver: Solver,
        sample: Sample | None = None,
        *,
        tokens: float = math.inf,
        consume: bool = False,
    ) -> Problem:
        """Order and factor ``hessian`` [K, K] fp32, the mean of x x^T over so many effective ``tokens``.

        With ``consume`` the storage of the Hessian is reused.
        """
        size = len(hessian)
        diagonal = hessian.diagonal().clone()
        order = column_order(diagonal, form.group_size, solver.order)
        if tokens < LEAST_TOKENS * size:
            # Text to which nothing is fitted does not weigh the columns either.
            poor = (
                f"the calibration text is worth only {tokens:,.0f} different tokens for {size:,} columns: "
                "rounded to nearest; calibrate on more varied text"
            )
            return cls(order, None, torch.ones_like(diagonal), refusal=poor)
        if sample is not None:
            sample = Sample(sample.inputs[:, order.columns], sample.weights)
        factor = factorize(hessian, order, solver.damping, consume=consume)
        refusal = "the Hessian could not be factored: rounded to nearest" if factor is None else None
        return cls(order, factor, column_importance(diagonal), sample, refusal)

    def correction(self, goal: Goal | None) -> Correction | None:
        """Return what ``goal`` adds to the rows of all its matrices; None without one, or where nothing is fitted.

        The goal needs held-out text.
        """
        if goal is None or self.factor is None:
            return None
        assert self.sample is not None
        return goal.solved(self.factor, self.order, self.sample)

    def cost(self, error: Tensor, quadratic: Tensor | None, missed: Tensor | None) -> Tensor:
        """Return what ``error`` [K, N] = G - Q costs each row, [N]: on held-out text, or without any by e^T H e.

        Args:
            error: the error in sweep order.
            quadratic: e^T H e of every row, [N], H damped; needed only without held-out text.
            missed: what G itself leaves of the goal on the held-out text, [S, N]; None where G is the matrix.
        """
        if self.sample is None:
            assert quadratic is not None
            return quadratic
        outputs = self.sample.inputs @ error
        return self.sample.errors(outputs if missed is None else outputs.add_(missed))

    def surely_less(self, cost: Tensor, than: Tensor, error: Tensor, other: Tensor, missed: Tensor | None) -> Tensor:
        """Return the rows [N] bool in which ``cost``, that of ``error``, is less ``than`` that of ``other``.

        On held-out text it has to be less by more than chance: by three standard errors of the difference between the
        two.
        """
        less = cost < than
        if self.sample is None or not bool(less.any()):
            return less
        outputs = [self.sample.inputs @ columns[:, less] for columns in (error, other)]
        if missed is not None:
            for output in outputs:
                output.add_(missed[:, less])
        saved = (outputs[1].square() - outputs[0].square()) * self.sample.weights[:, None]
        less[less.clone()] = saved.sum(0) > _SURE * saved.norm(dim=0)
        return less


def column_importance(diagonal: Tensor) -> Tensor:
    """Weight [K] of the squared error in each column: the Hessian's ``diagonal`` [K], the mean square of its input.

    A column that no input reached counts as much as the others do on average: text that does reach it still finds a
    weight there. So does one whose measure is not a number.
    """
    alive = (diagonal > 0) & diagonal.isfinite()
    mean = diagonal[alive].mean() if bool(alive.any()) else 1.0
    return torch.where(alive, diagonal, mean)
