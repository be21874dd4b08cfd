"""The routes by which torch can compute products of fp32 matrices, and switching to one of them.

Every product of the original, of the Hessians and of the solver is one of torch's, so that a route is a setting of
torch's and no caller knows of it. Products of oneDNN are the one route beside the default: asked for fp32 products
that may round to bf16, torch hands them to oneDNN, and on processors with AVX-512 and without AMX oneDNN rounds
nothing. Where MKL takes its slow path, as on AMD's processors, that is about twice as fast. On processors that do round
(AMX, bf16 on arm64) the check refuses it, as it would refuse TF32 on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from glmexport.results.arithmetic import FP32, OriginalArithmetic


@dataclass(frozen=True)
class Route:
    """A way to compute products of fp32 matrices."""

    name: str
    #: The precision that torch may ask oneDNN for: ``ieee``, which leaves products to its default library, or ``bf16``.
    onednn: str = "ieee"

    @property
    def offered(self) -> bool:
        """Whether this torch has it at all; what it does on this processor is another matter."""
        return self.onednn == "ieee" or bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute by this route within the context, in every thread; CUDA devices compute in fp32 in any case."""
        with _precision("mkldnn", self.onednn), _precision("cuda", "ieee"):
            yield


DEFAULT = Route(FP32)
ONEDNN = Route("onednn", "bf16")
#: All routes by name.
ROUTES = {route.name: route for route in (DEFAULT, ONEDNN)}


def computing(arithmetic: OriginalArithmetic) -> AbstractContextManager[None]:
    """Compute by the route of ``arithmetic`` within the context."""
    return ROUTES[arithmetic.route].computing()


@contextmanager
def _precision(backend: str, wanted: str) -> Iterator[None]:
    """Set the precision of fp32 products of ``backend`` alone: convolutions and other types of tensors keep theirs."""
    products = getattr(torch.backends, backend).matmul
    before = products.fp32_precision
    products.fp32_precision = wanted
    try:
        yield
    finally:
        products.fp32_precision = before
