"""The memory that a walk needs, and the batches that fit under a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.foundation.errors import MachineError
from glmexport.foundation.recipe import Recipe
from glmexport.quantization.allocation import tie_groups
from glmexport.quantization.factor import DOUBLE_LIMIT
from glmexport.quantization.moments import SAMPLE_POSITIONS
from glmexport.reference.filling import KEPT_BYTES

#: Number of probe positions whose logits over a slab of the lm_head are held at a time.
COMPARED_POSITIONS = 256
#: Number of positions, whoever chose them, on which a budget's probe measures every expert besides its own.
POOL_POSITIONS = 128
#: Fewest probe positions that routed experts see together: reading an expert takes as long as computing it for some.
MIXED_POSITIONS = 1 << 13
#: Bytes of the interpreter, torch, transformers and their allocators, measured before any weight is read.
BASE_BYTES = 700 << 20
_FP32 = 4
#: Number of copies of a chunk of rows that the solver holds at its peak: weights, error, its projection, the state
#: before the polish, temporaries.
_SOLVER_COPIES = 14
#: Number of copies of a chunk of rows while it is rounded to nearest: itself, its codes, their values, temporaries.
_ROUNDING_COPIES = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Batch sizes of a walk and the peak they lead to."""

    #: Number of tokens whose activations are computed together.
    batch_tokens: int
    #: Number of weights of one matrix that are solved together.
    chunk_weights: int
    #: The expected peak resident memory, bytes.
    peak_bytes: int


def plan_memory(architecture: Architecture, recipe: Recipe, limit_bytes: int | None = None) -> MemoryPlan:
    """Return the largest batches that keep the walk within ``limit_bytes``; the preferred ones if there is no limit.

    Raises:
        MachineError: even the smallest batches do not fit.
    """
    batch, chunk = 4096, 1 << 25
    while True:
        peak = _peak(architecture, recipe, batch, chunk)
        if limit_bytes is None or peak <= limit_bytes:
            return MemoryPlan(batch, chunk, peak)
        if batch <= 512 and chunk <= 1 << 22:
            raise MachineError(
                f"Quantizing {architecture.family} needs at least {peak / 2**30:.1f} GiB of memory, and the limit is "
                f"{limit_bytes / 2**30:.1f} GiB.",
                next_step="Raise --max-memory."
                + (" A recipe without calibration (rtn-w4g32) needs less." if recipe.needs_calibration else ""),
            )
        batch, chunk = max(512, batch // 2), max(1 << 22, chunk // 2)


def _peak(architecture: Architecture, recipe: Recipe, batch: int, chunk: int) -> int:
    # Round-to-nearest holds one chunk at a time, but needs a whole codes matrix.
    widest = max(linear.in_features * linear.out_features for _, linear in architecture.linears)
    solving = widest + chunk * _FP32 * _SOLVER_COPIES
    if not recipe.needs_calibration:
        return BASE_BYTES + solving
    peaks = [solving]
    # One layer of each kind is enough.
    for layer in {len(layer.linears): layer for layer in architecture.layers}.values():
        peaks += _layer_peaks(layer, recipe, batch, chunk)
    if recipe.budget:
        peaks += _probe_peaks(architecture, recipe, recipe.budget.probe_tokens, batch, chunk)
    return BASE_BYTES + max(peaks)


def _layer_peaks(layer: DecoderLayer, recipe: Recipe, batch: int, chunk: int) -> list[int]:
    """Yield the bytes while scales are folded, while each tap is measured and solved, and while the streams move on."""
    asymmetric = recipe.solver.asymmetric
    streams = 2 if asymmetric else 1
    held = 0
    before: dict[str, int] = {}
    mixture = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
    resident = layer.linears if mixture is None else layer.attention.linears
    # A whole block of the original, while scales are folded; of a mixture's experts as much as is kept.
    whole = sum(linear.in_features * linear.out_features for linear in resident) * _FP32
    widest_output = max(linear.out_features for linear in layer.linears)
    peaks = [whole + 3 * batch * widest_output * _FP32]
    if mixture is not None:
        sizes = [linear.in_features * linear.out_features * _FP32 for linear in mixture.linears]
        peaks[0] += min(KEPT_BYTES + max(sizes), sum(sizes))
        peaks += _expert_peaks(mixture, batch, chunk, asymmetric=asymmetric)
    for tap, linears in layer.taps.items():
        if linears[0] not in resident:
            continue
        branch = layer.branch(tap)
        size = linears[0].in_features
        hessian = size**2 * _FP32
        width = max(linear.out_features for linear in linears)
        ends = branch.output in linears
        inside = sum(linear.in_features * linear.out_features for linear in linears)
        # The branch's weights up to this tap, in both models; the original's own where its output is compared.
        blocks = (before.get(branch.module, 0) * streams + (inside if ends and asymmetric else 0)) * _FP32
        # The cross moment: of outputs where the matrix ends a branch.
        cross = (width if ends else size) * size * _FP32 if asymmetric else 0
        sample = SAMPLE_POSITIONS * (size + (width if ends else size)) * _FP32
        activations = (4 if asymmetric else 3) * batch * max(width, size) * _FP32
        peaks.append(held + blocks + hessian + cross + sample + activations)
        peaks.append(held + 2 * hessian + cross + sample + chunk * _FP32 * _SOLVER_COPIES)
        # While it is factored in fp64, before a chunk is read: the Hessian and two matrices twice its size.
        peaks.append(held + (5 if size <= DOUBLE_LIMIT else 2) * hessian + cross + sample)
        before[branch.module] = before.get(branch.module, 0) + inside
        # Codes of the matrices already solved, one byte a weight, wait for the commit.
        held += inside
        if ends:
            # The branch's output, from its dequantized matrix, while the batch before it is written.
            peaks.append(held + inside * _FP32 + 4 * batch * max(width, size) * _FP32)
    return peaks


def _expert_peaks(mixture: MixtureOfExperts, batch: int, chunk: int, *, asymmetric: bool) -> Iterator[int]:
    """Yield the bytes of each kind of expert: those that its matrices are solved from, and its outputs.

    The shared one is also fitted to the original's stream.
    """
    hidden = mixture.router.in_features
    pool = hidden**2
    for mlp in mixture.mlps[:2]:
        matrices = sum(linear.in_features * linear.out_features for linear in mlp.linears)
        rows = 3 * batch * max(2 * mlp.intermediate_size, hidden)
        for linear in mlp.linears:
            size = linear.in_features
            # Its own Hessian, that of the pool where it is another, and the factor.
            hessians = (2 + (4 if size <= DOUBLE_LIMIT else 1)) * size**2
            sample = SAMPLE_POSITIONS * size
            if asymmetric and mlp is mixture.shared:
                wide = hidden if linear is mlp.down else size
                sample += (size + SAMPLE_POSITIONS) * wide + matrices
            yield (pool + hessians + sample + matrices + max(rows, chunk * _SOLVER_COPIES)) * _FP32
        yield (pool + matrices + rows) * _FP32


def _probe_peaks(architecture: Architecture, recipe: Recipe, tokens: int, batch: int, chunk: int) -> list[int]:
    """Yield the bytes of the trials under a budget: inside a block, and when all are compared at the lm_head."""
    hidden = architecture.hidden_size
    states = tokens * hidden
    tried = max(len(group.tried) for group in tie_groups(architecture, recipe))
    layers = {len(layer.linears): layer for layer in architecture.layers}.values()
    peaks = [peak for layer in layers for peak in _trial_peaks(layer, hidden, tokens, tried, batch, chunk)]
    logits = 3 * COMPARED_POSITIONS * chunk // hidden
    compared = (compared_trials(batch, tokens) + 4) * states + (_ROUNDING_COPIES + tried + 1) * chunk + logits
    return [peak * _FP32 for peak in (*peaks, compared)]


def _trial_peaks(layer: DecoderLayer, hidden: int, tokens: int, tried: int, batch: int, chunk: int) -> Iterator[int]:
    """Yield the numbers that are in memory while trials pass a block, and while its routed experts are tried."""
    states, routed = tokens * hidden, layer.mlp.routed
    taps = [
        sum(linear.in_features * linear.out_features for linear in linears)
        for linears in layer.taps.values()
        if linears[0].weight not in routed
    ]
    inputs = 2 * tokens * max(linear.in_features for linear in layer.linears)
    forward = 3 * batch * max(linear.out_features for linear in layer.linears)
    # The original's states, a trial's before and after the block, and the rounded matrices of one tap.
    block = sum(taps) + max(taps) + 3 * states + max(inputs, forward, _ROUNDING_COPIES * chunk)
    if not isinstance(layer.mlp, MixtureOfExperts):
        yield block
        return
    matrices = [linear.in_features * linear.out_features for linear in layer.mlp.experts[0].linears]
    kept = min(KEPT_BYTES // _FP32, sum(matrices) * len(layer.mlp.experts)) + sum(matrices)
    # What waits for the experts, its norm, and what they give.
    together = 3 * (MIXED_POSITIONS + tokens) * hidden
    yield block + kept + together
    # The stream, its norm and the output; the change of every trial; an expert and a rounded matrix at its positions.
    width = layer.mlp.experts[0].intermediate_size
    positions = (tokens + POOL_POSITIONS) * (3 * hidden + 4 * width)
    rounding = max(matrices) + _ROUNDING_COPIES * min(chunk, max(matrices))
    yield sum(taps) + kept + (4 + 2 * tried) * states + sum(matrices) + rounding + positions


def compared_trials(batch_tokens: int, tokens: int) -> int:
    """Return how many trials of ``tokens`` each are compared with the original in one pass over the lm_head."""
    return max(1, 4 * batch_tokens // tokens)
