"""The divergence of two next-token distributions."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P || Q) = sum_v P(v) (ln P(v) - ln Q(v)) in nats, of log probabilities [..., vocabulary], as [...].

    Give it fp64: differences of nearly equal logarithms cancel, and a mean of a thousandth of a nat must not be
    rounding noise. What little goes below zero is clamped.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
