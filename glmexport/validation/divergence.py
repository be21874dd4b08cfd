"""The divergence of two next-token distributions: pure functions on logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P || Q) = sum_v P(v) (ln P(v) - ln Q(v)) in nats, of log probabilities [..., vocabulary], as [...].

    Give it fp64: differences of nearly equal logarithms cancel, and a mean of a thousandth of a nat must not be
    rounding noise. What little goes below zero is clamped.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class Divergence:
    """The divergence at each judged position; every field is [positions], fp32 unless noted.

    ``kl``: KL(original || bundle), nats. ``nll_original``, ``nll_bundle``: negative log probability of the text's own
    next token, nats. ``top_original``, ``top_bundle``: most likely token, int64. ``p_original``, ``p_bundle``:
    the probability that each gives to the original's most likely token.
    """

    kl: Tensor
    nll_original: Tensor
    nll_bundle: Tensor
    top_original: Tensor
    top_bundle: Tensor
    p_original: Tensor
    p_bundle: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every field, in the order in which they are given."""
        return tuple(vars(self).values())

    @staticmethod
    def concatenate(parts: list[Divergence]) -> Divergence:
        """Return the positions of several texts, one after the other."""
        return Divergence(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def divergence(original: Tensor, bundle: Tensor, targets: Tensor) -> Divergence:
    """Compare logits [positions, vocabulary] fp32 of the same positions; ``targets`` [positions] int64.

    Sums are over the whole vocabulary, in fp64.
    """
    log_p = original.double().log_softmax(-1)
    log_q = bundle.double().log_softmax(-1)
    kl = kl_divergence(log_p, log_q)
    top = log_p.argmax(-1)

    def of(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
        return log_probabilities.gather(-1, tokens[:, None])[:, 0]

    return Divergence(
        kl=kl.float(),
        nll_original=-of(log_p, targets).float(),
        nll_bundle=-of(log_q, targets).float(),
        top_original=top,
        top_bundle=log_q.argmax(-1),
        p_original=of(log_p, top).exp().float(),
        p_bundle=of(log_q, top).exp().float(),
    )
