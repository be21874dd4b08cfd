"""Products of bf16 matrices, by which calibration text passes the blocks where a processor computes them much faster.

Inputs, weights and outputs of a linear are rounded to bf16, each by at most 1 part in 256; between linears everything
stays fp32, the residual stream first of all. A checkpoint's weights are bf16 as they are. Such text tells what a matrix
reads, which sums over thousands of tokens average out; nothing is judged by it.

Moments of such text are of numbers that bf16 holds. The product of two of them fits into fp32, so that oneDNN's bf16
products, whose sums are fp32, are as exact there as fp32's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from glmexport.reference.arithmetic import ONEDNN


def coarse_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return ``inputs`` [..., K] times ``weight`` [N, K] transposed, in bf16; the result is fp32 [..., N]."""
    return functional.linear(inputs.bfloat16(), weight.bfloat16()).float()

#: Rows that are rounded together, which no allocator maps anew.
_ROUNDED = 256


class Rounding:
    """Rounds batches of fp32 rows to numbers that bf16 holds, or if not ``coarse`` leaves them as they are.

    The result of one batch is written over by the next: pages that are new for every batch take a tenth of the time in
    which a moment is added to.
    """

    def __init__(self, *, coarse: bool) -> None:
        self.coarse = coarse
        self._kept: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``values`` [n, K], rounded, as fp32."""
        if not self.coarse:
            return values
        if self._kept is None or len(self._kept) < len(values):
            self._kept = torch.empty_like(values, memory_format=torch.contiguous_format)
        rows = self._kept[: len(values)]
        for into, part in zip(torch.split(rows, _ROUNDED), torch.split(values, _ROUNDED), strict=True):
            into.copy_(part.bfloat16())
        return rows


def exact_products(*, coarse: bool) -> AbstractContextManager[None]:
    """Compute fp32 products, whose operands bf16 holds if ``coarse``, without rounding anything but sums."""
    return ONEDNN.computing() if coarse else nullcontext()


class CoarseLinear(nn.Module):
    """A linear that computes in bf16. It holds its weight in bf16, and its bias is added in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output [..., N] fp32 for ``inputs`` [..., K] fp32."""
        product = coarse_product(inputs, self.weight)
        return product if self.bias is None else product.add_(self.bias)


def make_coarse(module: nn.Module) -> None:
    """Let every linear in ``module`` that has its weight compute in bf16."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.device != torch.device("meta"):
                setattr(parent, name, CoarseLinear(child))
