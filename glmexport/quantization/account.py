"""The account of a walk: what each of its stages computes, reads and writes, derived from shapes alone.

Left out are what an indexer of latent attention computes, a factorization that is repeated with more damping or in
fp64, and the second look at rows that seem better off rounded to nearest. K is the number of inputs of a matrix, N that
of its outputs, and S that of the held-out positions that solutions are judged on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from glmexport.architecture.description import Architecture, DecoderLayer, Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.latent import LatentAttention
from glmexport.calibration.hessian import hessian_operations
from glmexport.calibration.sequences import CalibrationSet
from glmexport.formats.codecs import codec_of
from glmexport.formats.plan import FormatPlan, allows_coarse
from glmexport.foundation.recipe import CalibrationPlan, Format, Recipe
from glmexport.foundation.work import Account, Work, added
from glmexport.quantization.allocation import count_trials
from glmexport.quantization.cholesky import cholesky_operations, solving_operations
from glmexport.quantization.decisions import FOLD_TOKENS
from glmexport.quantization.folding import TRIED_ROWS
from glmexport.quantization.memory import MemoryPlan
from glmexport.quantization.mixture import LEAST_HELD, POOL_POSITIONS
from glmexport.quantization.moments import SAMPLE_POSITIONS
from glmexport.quantization.order import STRIP
from glmexport.quantization.solve import told_stride

_FP32 = 4
#: One calibration sequence in so many is held out.
_HELD = 8


@dataclass(frozen=True)
class TextSize:
    """The size of a calibration text: ``held`` of its ``sequences`` are held out, and ``prefix`` positions left out."""

    sequences: int
    length: int
    prefix: int
    held: int

    @classmethod
    def planned(cls, plan: CalibrationPlan, longest: int, prefix: int) -> TextSize:
        """Return the size of a text that fills ``plan``, in sequences of at most ``longest`` tokens."""
        length = min(plan.sequence_length, longest)
        sequences = max(2, plan.tokens // length)
        return cls(sequences, length, prefix, max(1, sequences // _HELD))

    @classmethod
    def of_text(cls, text: CalibrationSet) -> TextSize:
        """Return the size of ``text``."""
        sequences, length = text.ids.shape
        return cls(sequences, length, text.prefix, int(text.selection.sum()))

    @property
    def positions(self) -> int:
        """The positions that are computed."""
        return self.sequences * self.length

    @property
    def fitted(self) -> int:
        """The positions that Hessians count."""
        return (self.sequences - self.held) * (self.length - self.prefix)

    @property
    def tested(self) -> int:
        """The positions held out, of which some are the sample."""
        return self.held * (self.length - self.prefix)

    @property
    def sample(self) -> int:
        """The held-out positions that solutions are judged on."""
        stride = math.ceil(self.tested / SAMPLE_POSITIONS) or 1
        return self.held * math.ceil((self.length - self.prefix) / stride)


def product(rows: float, linear: Linear) -> float:
    """Return the operations of x W^T for ``rows`` of x: 2 rows K N."""
    return 2.0 * rows * linear.in_features * linear.out_features


def attention_operations(layer: DecoderLayer, positions: float, length: int) -> float:
    """Return the operations of q k^T and p v: each position with each of ``length``, 2 (d_qk + d_v) a head."""
    attention = layer.attention
    value = attention.value_dim if isinstance(attention, LatentAttention) else attention.head_dim
    return 2.0 * positions * length * attention.heads * (attention.head_dim + value)


def forward_work(layer: DecoderLayer, positions: float, length: int) -> Work:
    """Return the work of computing a layer once: every linear, a routed one for its share, and the attention."""
    mlp = layer.mlp
    operations = sum(
        product(positions * (mlp.routed_share if each.weight in mlp.routed else 1.0), each) for each in layer.linears
    )
    if isinstance(mlp, MixtureOfExperts):
        operations += 2.0 * positions * mlp.router.in_features * mlp.router.experts
    return Work(products=operations, attention=attention_operations(layer, positions, length))


def walk_account(
    architecture: Architecture, recipe: Recipe, plan: FormatPlan, text: TextSize | None, memory: MemoryPlan
) -> Account:
    """Return the work of every stage of a walk.

    Args:
        architecture: what is quantized.
        recipe: how.
        plan: the format of every matrix.
        text: the size of the calibration text; None without one.
        memory: the batches.
    """
    account: Account = {}
    draft = architecture.token_prediction
    # A layer that drafts is rounded to nearest in any case.
    for linear in draft.matrices if draft else ():
        _round(account, linear, plan.form(linear.weight), searched=recipe.solver.scale_search)
    if text is None:
        for _, linear in architecture.linears:
            _round(account, linear, plan.form(linear.weight), searched=recipe.solver.scale_search)
        return account
    walked = _Walk(architecture, recipe, plan, text, memory, account)
    if recipe.solver.fold_scales and recipe.linears is not None:
        walked.fold()
    if recipe.budget:
        walked.allocate()
    for layer in architecture.layers:
        walked.attend(layer)
        if isinstance(layer.mlp, MixtureOfExperts):
            walked.mix(layer, layer.mlp)
        else:
            walked.branch(layer, layer.mlp.linears)
        # Both streams behind each branch, in files.
        bytes_of_streams = 2 * walked.streams * text.positions * architecture.hidden_size * _FP32
        added(account, "write", Work(written_bytes=bytes_of_streams))
    if plan.form(architecture.lm_head.weight) is not None and not architecture.tied:
        walked.head()
    return account


@dataclass(frozen=True)
class _Walk:
    """A walk whose work is added to ``account``."""

    architecture: Architecture
    recipe: Recipe
    plan: FormatPlan
    text: TextSize
    memory: MemoryPlan
    account: Account

    @property
    def streams(self) -> int:
        """The number of streams: with an asymmetric target the original's is kept too."""
        return 2 if self.asymmetric else 1

    @cached_property
    def coarse(self) -> bool:
        """Whether the text may pass the blocks in bf16, where the machine is faster so."""
        return allows_coarse(self.architecture, self.recipe)

    @property
    def asymmetric(self) -> bool:
        return self.recipe.solver.asymmetric and self.text.held > 0

    def add(self, stage: str, **work: float) -> None:
        added(self.account, stage, Work(**work))

    def stream(self, operations: float) -> None:
        """Products by which the text passes a block."""
        self.add("streams", **{"coarse_products" if self.coarse else "products": operations})

    def add_moments(self, stage: str, operations: float, *, triangle: bool = True) -> None:
        """Products of moments, of which a Hessian is only the lower triangle."""
        fine = "moments" if triangle else "products"
        self.add(stage, **{"coarse_moments" if self.coarse else fine: operations})

    def fold(self) -> None:
        """A forward pass over held-out text; some rows of every matrix are rounded as they are and in three folds."""
        positions = min(FOLD_TOKENS, self.text.held * self.text.length)
        for layer in self.architecture.layers:
            added(self.account, "folding", forward_work(layer, positions, self.text.length))
            self.add("folding", products=_again(layer, positions))
            self.add("reading", read_values=sum(map(_size, layer.linears)))
            for tap in layer.writers:
                tried = sum(min(TRIED_ROWS, each.out_features) * each.in_features for each in layer.taps[tap])
                self.add("folding", searched_weights=4 * tried, rounded_weights=4 * tried)

    def allocate(self) -> None:
        """Every trial goes through half of the model on average, and through the lm_head."""
        assert self.recipe.budget is not None
        trials = count_trials(self.architecture, self.recipe)
        tokens = self.recipe.budget.probe_tokens
        whole = Work(products=2 * product(tokens, self.architecture.lm_head))
        for layer in self.architecture.layers:
            whole += forward_work(layer, tokens, self.text.length)
        added(self.account, "allocation", whole.times(trials / 2))

    def attend(self, layer: DecoderLayer) -> None:
        """The attention, in which what lies before a tap is computed for each tap."""
        attention, text = layer.attention, self.text
        self.branch(layer, attention.linears)
        self.add("streams", attention=self.streams * attention_operations(layer, text.positions, text.length))
        self.stream(self.streams * _again(layer, text.positions))

    def branch(self, layer: DecoderLayer, linears: tuple[Linear, ...]) -> None:
        """Both streams pass every linear once; every tap of those with a format is measured and solved."""
        text = self.text
        self.stream(self.streams * sum(product(text.positions, each) for each in linears))
        self.add("reading", read_values=(self.streams - 1) * sum(map(_size, linears)))
        last = linears[-1]
        self.add("write", written_bytes=text.positions * last.in_features * _FP32)
        for members in layer.taps.values():
            if members[0] in linears and self.plan.form(members[0].weight) is not None:
                self.measure(members[0], ends=last in members)
                for linear in members:
                    self.solve(linear, self.recipe.solver.polish_rounds, text.sample, ends=last in members, goal=True)

    def measure(self, linear: Linear, *, ends: bool) -> None:
        """Measure the moments of a tap: its Hessian and, of a goal of M outputs or else M = K inputs, E[d x^T]."""
        text, size = self.text, linear.in_features
        self.add_moments("Hessians", hessian_operations(text.fitted, size))
        self.add("factorization", triangular=cholesky_operations(size))
        if not self.asymmetric:
            return
        rows = linear.out_features if ends else size
        self.add_moments("goal", 2.0 * text.fitted * rows * size, triangle=False)
        if ends:
            # What the matrix makes of the inputs is taken off: W H, and W x on the sample.
            self.add("goal", products=2.0 * rows * size * (size + text.sample))
        else:
            # H^-1 C once for all matrices of the tap, and what it adds on the sample.
            self.add("goal", triangular=solving_operations(size, size), products=2.0 * text.sample * size**2)

    def solve(self, linear: Linear, rounds: int, sample: int, *, ends: bool, goal: bool) -> None:
        """Solve one matrix: its goal, the sweep, ``rounds`` of polish, and the comparison with round-to-nearest."""
        form = self.plan.form(linear.weight)
        assert form is not None
        size, rows, weights = linear.in_features, linear.out_features, _size(linear)
        if goal and self.asymmetric:
            if ends:
                self.add("goal", triangular=solving_operations(size, rows), products=2.0 * sample * weights)
            else:
                self.add("goal", products=2.0 * (size + 2 * sample) * weights)
        chunks = math.ceil(rows / max(64, self.memory.chunk_weights // size))
        span = min(form.group_size, size)
        inside = max(0, span - STRIP)
        searched = weights if self.recipe.solver.scale_search else 0.0
        # Groups before a column reach it by K (K - g), strips of its own group by K (g - 16).
        self.add(
            "sweep",
            products=(size - span + inside) * weights,
            triangular=span * weights,
            swept_columns=size * chunks,
            swept_weights=weights,
            searched_weights=searched,
        )
        # Each group takes its rows of H E, 2 K K; its own part of H meets the change and the levels, 2 g K each.
        self.add(
            "polish",
            products=rounds * (2.0 * size + 4.0 * span + inside) * weights,
            polished_columns=rounds * size * chunks,
            polished_weights=rounds * weights,
        )
        judged = 2.0 * sample * (3 if rounds else 2) * weights
        if not sample:
            # e^T H e behind the polish, and until the other is reached.
            judged = (2.0 * bool(rounds) + 1.0) * size * weights
        told = math.ceil(rows / told_stride(size)) * size
        self.add("comparison", products=judged + 3 * 2.0 * size * told)
        self.add("comparison", rounded_weights=weights, searched_weights=searched)
        self.add("reading", read_values=weights)
        self.add("hash", hashed_bytes=weights)
        self.add("write", written_bytes=weights * form.bits / 8)

    def head(self) -> None:
        """Measure and solve the lm_head: at 8 bits without polish."""
        head = self.architecture.lm_head
        form = self.plan.form(head.weight)
        assert form is not None
        self.measure(head, ends=False)
        rounds = 0 if form.bits == 8 else self.recipe.solver.polish_rounds
        self.solve(head, rounds, self.text.sample, ends=False, goal=True)

    def mix(self, layer: DecoderLayer, mixture: MixtureOfExperts) -> None:
        """The router, the routed experts on the positions that chose them, and the shared one on all."""
        text, router = self.text, mixture.router
        routes = 2.0 * text.positions * router.in_features * router.experts
        self.add("streams", products=self.streams * routes)
        self.add_moments("Hessians", hessian_operations(text.fitted, router.in_features))
        share = router.chosen / router.experts
        pooled = math.ceil(text.fitted / max(1, text.fitted // POOL_POSITIONS))
        held = text.tested * share
        sample = round(held / (math.ceil(held / SAMPLE_POSITIONS) or 1)) if held >= LEAST_HELD else 0
        rounds = self.recipe.solver.expert_polish_rounds
        for expert in mixture.experts:
            up, down = expert.linears
            # Each stream, for its outputs; the quantized one, for the input of the last matrix and its pool.
            outputs = self.streams * text.positions * share
            inside = text.fitted * share + pooled + sample
            self.stream(product(outputs + inside, up) + product(outputs, down))
            self.add("reading", read_values=(self.streams - 1) * sum(map(_size, expert.linears)))
            for linear, pool in ((up, 0), (down, pooled)):
                if self.plan.form(linear.weight) is None:
                    continue
                positions = text.fitted * share + pool
                self.add_moments("Hessians", hessian_operations(positions, linear.in_features))
                self.add("factorization", triangular=cholesky_operations(linear.in_features))
                self.solve(linear, rounds, sample, ends=False, goal=False)
        if mixture.shared:
            up, down = mixture.shared.linears
            again = self.streams - 1
            operations = product((self.streams + 1 + again) * text.positions, up)
            operations += product((self.streams + again) * text.positions, down)
            self.stream(operations)
            self.add("reading", read_values=2 * again * sum(map(_size, mixture.shared.linears)))
            for linear in mixture.shared.linears:
                if self.plan.form(linear.weight) is not None:
                    self.measure(linear, ends=linear is down)
                    rounds = self.recipe.solver.polish_rounds
                    self.solve(linear, rounds, text.sample, ends=linear is down, goal=True)


def _size(linear: Linear) -> float:
    return float(linear.in_features * linear.out_features)


def _round(account: Account, linear: Linear, form: Format | None, *, searched: bool) -> None:
    """Add the work of rounding a matrix to nearest without any text, with a search where the format gains by it."""
    if form is None:
        return
    weights = _size(linear)
    tried = weights if searched and codec_of(form).searched else 0.0
    added(account, "comparison", Work(rounded_weights=weights, searched_weights=tried))
    added(account, "reading", Work(read_values=weights))
    added(account, "hash", Work(hashed_bytes=weights))


def _again(layer: DecoderLayer, positions: float) -> float:
    """Return the operations of the linears before the taps of an attention, beyond the first time.

    The latent of the queries is computed for its own tap, with the queries and the other latent for the next one, and
    all of them for the attention itself.
    """
    attention = layer.attention
    if not isinstance(attention, LatentAttention):
        return 0.0
    again = [each for each in (attention.query_down,) if each] * 2 + [attention.query, attention.down]
    return sum(product(positions, each) for each in again)


def stages(account: Account) -> Iterator[str]:
    """Yield the names of the stages in the order in which a walk comes to them."""
    order = (
        "folding", "allocation", "reading", "streams", "Hessians", "factorization", "goal", "sweep", "polish",
        "comparison", "write", "hash",
    )  # fmt: skip
    yield from (stage for stage in order if stage in account)
