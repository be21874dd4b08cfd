"""A distribution kept by its most likely tokens and the mass of all others, and the divergence that this shows.

Two distributions summed over the cells of a partition are never farther apart than they were (data processing
inequality: Cover and Thomas, Elements of Information Theory, 2nd edition, section 2.8, log sum inequality). KL on
{token 1} ... {token k} {all others} is therefore a lower bound of KL over the vocabulary, and equals it where the
others keep their proportions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmexport.validation.divergence import Divergence, kl_divergence


@dataclass(frozen=True)
class Partition:
    """The original's next-token distribution at the judged positions of a text.

    ``tokens`` [positions, k] int64, most likely first; ``log_probabilities`` [positions, k] and ``log_tail``
    [positions], the logarithm of the probability of all other tokens together (-inf where k is the vocabulary), in
    nats; ``nll`` [positions], of the text's own next token. All fp32, rounded from fp64.
    """

    tokens: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    nll: Tensor

    @staticmethod
    def concatenate(parts: list[Partition]) -> Partition:
        """Return the positions of several texts, one after the other."""
        return Partition(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def partition(logits: Tensor, targets: Tensor, k: int) -> Partition:
    """Return the ``k`` most likely tokens of logits [positions, vocabulary] fp32 and the exact mass of the others."""
    log_p = logits.double().log_softmax(-1)
    values, tokens = log_p.topk(min(k, logits.shape[-1]))
    return Partition(
        tokens=tokens,
        log_probabilities=values.float(),
        log_tail=log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1).float(),
        nll=-log_p.gather(-1, targets[:, None])[:, 0].float(),
    )


def partition_divergence(original: Partition, bundle: Tensor, targets: Tensor) -> Divergence:
    """Return the divergence from an original that is known by its partition; ``kl`` is a lower bound.

    ``bundle``: logits [positions, vocabulary] fp32; ``targets`` [positions] int64.
    """
    log_q = bundle.double().log_softmax(-1)
    kept = log_q.gather(-1, original.tokens)
    others = log_q.scatter(-1, original.tokens, -torch.inf).logsumexp(-1)
    return cells_divergence(
        original,
        torch.cat([kept, others[:, None]], -1),
        nll=-log_q.gather(-1, targets[:, None])[:, 0].float(),
        top=log_q.argmax(-1),
    )


def cells_divergence(original: Partition, log_cells: Tensor, *, nll: Tensor, top: Tensor) -> Divergence:
    """Return the same divergence where the bundle is known by the same cells.

    ``log_cells`` [positions, k + 1] fp64, normalized: the original's tokens, and all others; ``nll`` [positions] fp32
    of the text's own next token; ``top`` [positions] int64, the most likely one.
    """
    log_p = torch.cat([original.log_probabilities, original.log_tail[:, None]], -1).double()
    # In fp32 the cells have a sum of 1 + 1e-7, which would be that much divergence.
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    # An empty cell adds nothing, where -inf less -inf would be no number.
    empty = log_p == -torch.inf
    return Divergence(
        kl=kl_divergence(log_p.masked_fill(empty, -1e4), log_cells.masked_fill(empty, 0)).float(),
        nll_original=original.nll,
        nll_bundle=nll,
        top_original=original.tokens[:, 0],
        top_bundle=top,
        p_original=original.log_probabilities[:, 0].exp(),
        p_bundle=log_cells[:, 0].exp().float(),
    )
