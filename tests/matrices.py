"""Weights, inputs and errors for the solver's tests, all from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.recipe import Format

EVERY_FORM = [
    Format(bits=bits, group_size=size, symmetric=symmetric)
    for bits in (2, 4, 8)
    for size in (16, 32, 64, 128, 256)
    for symmetric in (False, True)
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=generator(seed)) * 0.05


def correlated(size: int, seed: int = 0, rank: int = 0, noise: float = 0.2) -> Tensor:
    """Hessian of inputs that lie near a space of few dimensions, as activations do."""
    random = generator(seed + 1000)
    tokens, rank = 4 * size, rank or size // 8
    inputs = torch.randn(tokens, rank, generator=random) @ torch.randn(rank, size, generator=random)
    inputs += noise * rank**0.5 * torch.randn(tokens, size, generator=random)
    return inputs.T @ inputs / tokens


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T of every row, in double precision."""
    wide = error.double()
    return ((wide @ hessian.double()) * wide).sum(1)


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) in double precision."""
    return float(row_errors(error, hessian).sum())


def relative_error(weight: Tensor, linear: QuantizedLinear, hessian: Tensor) -> float:
    return output_error(weight - linear.dequantize(), hessian) / output_error(weight, hessian)


def random_linear(rows: int, size: int, form: Format, seed: int = 0) -> QuantizedLinear:
    """Codes, scales of both signs, and zero points over the whole range."""
    random = generator(seed)
    groups = -(-size // form.group_size)
    scales = torch.rand(rows, groups, generator=random) * 0.1 + 0.01
    if form.symmetric:
        scales *= torch.randint(0, 2, scales.shape, generator=random) * 2 - 1

    def integers(columns: int) -> Tensor:
        return torch.randint(0, 2**form.bits, (rows, columns), generator=random, dtype=torch.uint8)

    return QuantizedLinear(form, integers(size), scales.half(), None if form.symmetric else integers(groups))
