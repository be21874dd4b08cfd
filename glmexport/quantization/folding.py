"""Scales between the channels of a tap, moved into the tensor that writes its input, where rounding becomes cheaper.

Multiplying column j of a linear by s_j and dividing its input by s_j changes nothing (the exact part of AWQ,
arXiv 2306.00978, and SmoothQuant, arXiv 2211.10438), but all columns of a group share a step, so one large column costs
the others their precision. Rounding to a step in proportion to the p-norm of a group leaves an error of
sum_j h_j / s_j^2 (sum_j |w_j s_j|^p)^(2/p), which s_j = (h_j / |w_j|^p)^(1 / (p + 2)) minimises: h_j is the mean square
of the channel, |w_j| the size of its weights. Only powers of two are used, so that the model is the same to the last
bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from glmexport.architecture.description import Linear, Norm, Writer
from glmexport.checkpoint.fold import Fold
from glmexport.formats.codecs import codec_of
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format
from glmexport.reference.reference import Block, Reference

#: Powers p that are tried: between a step that follows the whole group and one that follows its largest weight.
_POWERS = (2.0, 4.0, 8.0)
#: Share of the rounding error that a fold must save to be worth it.
_LEAST_GAIN = 0.05
_LARGEST_EXPONENT = 10
#: Smallest scale that dividing a row may leave: fp16 holds a scale in full precision down to 2^-14.
_SMALLEST_SCALE = 2.0**-12
#: Share of the mean that channels without any signal count, so that text which does reach them finds its weights.
_LEAST_IMPORTANCE = 1e-3
#: Number of rows of a matrix on which folds are compared.
TRIED_ROWS = 256


def choose_folds(
    reference: Reference, ids: Tensor, prefix: int, form: Format, batch_tokens: int, progress: Progress
) -> dict[str, Fold]:
    """Return the folds of every decoder layer, by the name of the tensor; empty where none saves enough.

    Args:
        reference: the original.
        ids: [sequences, length], the text on which channels are measured.
        prefix: positions at the start of each sequence that do not count.
        form: the format that the linears are rounded to.
        batch_tokens: the number of tokens that are computed together.
        progress: the observer of the layers.
    """
    positions = reference.position_embeddings(ids.shape[1])
    batch = max(1, batch_tokens // ids.shape[1])
    hidden = [reference.embed(part) for part in torch.split(ids, batch)]
    exponents: dict[str, dict[str, Tensor]] = {}
    with progress.track("Folding scales", len(reference.architecture.layers)) as track:
        for layer in reference.architecture.layers:
            block = reference.block(layer)
            squares = _through(block, hidden, positions, prefix)
            for tap, writer in layer.writers.items():
                _fold_tap(block, layer.taps[tap], writer, squares[tap], form, exponents)
            track.advance(1, f"block {layer.index}")
    return {key: Fold(parts.get("rows"), parts.get("columns")) for key, parts in exponents.items()}


def _through(block: Block, hidden: list[Tensor], positions: tuple[Tensor, Tensor], prefix: int) -> dict[str, Tensor]:
    """Return the mean square [K] of the input of every tap; ``hidden`` becomes the next layer's input."""
    layer = block.layer
    squares: dict[str, Tensor] = {}
    for index in range(len(hidden)):
        stream = hidden[index]
        for branch in layer.branches:
            if branch.output is None:
                stream = block.through(branch, stream)
                continue
            inside = [tap for tap in layer.taps if layer.branch(tap) == branch]
            for tap in inside:
                read = block.branch_tap(tap, stream, positions)
                squares[tap] = squares.get(tap, 0) + read[:, prefix:].square().sum((0, 1))
            stream = block.add(branch, stream, block.output(branch, read))
        hidden[index] = stream
    count = sum(len(stream) for stream in hidden) * (hidden[0].shape[1] - prefix)
    return {tap: total / count for tap, total in squares.items()}


def _fold_tap(
    block: Block,
    linears: tuple[Linear, ...],
    writer: Writer,
    squares: Tensor,
    form: Format,
    exponents: dict[str, dict[str, Tensor]],
) -> None:
    """Add the best fold of a tap to ``exponents``, which are by tensor and axis, if one is worth it."""
    # The choice is among a few vectors; the errors of the choices are measured on the device of the weights.
    squares = squares.cpu()
    importance = squares.clamp(min=_LEAST_IMPORTANCE * float(squares.mean()))
    weights = [block.weight(linear.weight) for linear in linears]
    sampled = [rows[:: -(-len(rows) // TRIED_ROWS)] for rows in weights]
    lengths = torch.stack([torch.linalg.vector_norm(rows, dim=0) for rows in weights]).cpu()
    size = (lengths.square().sum(0) / sum(map(len, weights))).sqrt()
    index = torch.tensor(writer.rows)
    largest = None
    if isinstance(writer.source, Linear):
        extent = torch.linalg.vector_norm(block.weight(writer.source.weight), math.inf, dim=1).cpu()[index]
        largest = (extent / codec_of(form).reach / _SMALLEST_SCALE).clamp(min=1).log2().floor()
    best = None
    changing = [candidate for candidate in fold_candidates(importance, size, index, largest) if bool(candidate.any())]
    if changing:
        least = (1 - _LEAST_GAIN) * _rounding_error(sampled, importance, torch.zeros(len(size)), form)
    for candidate in changing:
        error = _rounding_error(sampled, importance, candidate, form)
        if error < least:
            best, least = candidate, error
    if best is None:
        return
    for linear in (*linears, *writer.also_read_by):
        exponents.setdefault(linear.weight, {})["columns"] = best.to(torch.int8)
    length = writer.source.size if isinstance(writer.source, Norm) else writer.source.out_features
    rows = torch.zeros(length, dtype=torch.int8)
    rows[index] = -best.to(torch.int8)
    exponents.setdefault(writer.source.weight, {})["rows"] = rows
    if isinstance(writer.source, Linear) and writer.source.bias_key:
        exponents.setdefault(writer.source.bias_key, {})["rows"] = rows.clone()


def fold_candidates(importance: Tensor, size: Tensor, rows: Tensor, largest: Tensor | None) -> Iterator[Tensor]:
    """Yield exponents [K] fp32 with integral values, the same for all channels that one row writes."""
    weights = size.clamp(min=1e-3 * float(size.mean()))
    for power in _POWERS:
        exponents = (importance.log2() - power * weights.log2()) / (power + 2)
        slots = torch.zeros(int(rows.max()) + 1)
        shared = torch.bincount(rows, minlength=len(slots)).clamp(min=1)
        exponents = (slots.index_add(0, rows, exponents) / shared)[rows]
        exponents = (exponents - exponents.mean()).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        yield exponents if largest is None else torch.minimum(exponents, largest)


def _rounding_error(sampled: list[Tensor], importance: Tensor, exponents: Tensor, form: Format) -> float:
    """Return sum_j h_j e_j^2 over ``sampled`` rows [n, K], e the error of rounding with ``exponents`` folded in."""
    error, codec = 0.0, codec_of(form)
    for weight in sampled:
        folded = torch.ldexp(weight, exponents.to(weight.device))
        scaled = torch.ldexp(importance, -2 * exponents).to(weight.device)
        for start in range(0, weight.shape[1], form.group_size):
            span = slice(start, start + form.group_size)
            columns = folded[:, span].T.contiguous()
            grid = codec.fit(columns, scaled[span])
            missed = grid.decode(grid.encode(columns)).sub_(columns)
            error += float((scaled[span] @ missed.square_()).sum())
    return error if math.isfinite(error) else math.inf
