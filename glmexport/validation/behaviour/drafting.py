"""The number of drafted tokens that a pass through the original checks, from what passes and tokens cost.

A token that is drafted and refused was computed in vain; a pass reads the whole checkpoint, however few tokens it
computes. With a share r of drafted tokens refused, and n tokens computed a pass, an answer gains
(1 - (1 - r)^n) / r tokens (Leviathan et al., arXiv 2211.17192, equation 1). If a pass costs as much as w more tokens of
each answer, one token of it costs (w + n) r / (1 - (1 - r)^n), which for small n r is about (1 + w / n) (1 + n r / 2),
and least at n = sqrt(2 w / r).
"""

from __future__ import annotations

import math

from glmexport.architecture.description import Architecture

#: Number of tokens that are computed while a dense checkpoint is read and converted: about 2.5 ns a parameter for two
#: bytes from a disk, and 0.02 ns for a multiply-add in fp32 on a processor's cores.
PASS_TOKENS = 128
#: The most that n r may be while drafts are mostly right: then 1.27 tokens are computed for each that an answer gains.
_MOST_REFUSED = 0.5
#: A pass checks so many tokens even where drafts are mostly wrong, if that is cheaper.
_FEW = 4
#: A share of refused tokens that is taken for granted at first, as if it had been seen on so many tokens.
_ASSUMED, _ASSUMED_TOKENS = 0.02, 50
#: An answer's own share of refused tokens counts as much as that of all answers once it has so many tokens.
_OWN_TOKENS = 32


def pass_tokens(architecture: Architecture) -> float:
    """Return how many tokens are computed while all blocks are read: more where a token passes few of many experts."""
    read = computed = 0.0
    for layer in architecture.layers:
        for linear in layer.linears:
            size = linear.out_features * linear.in_features
            read += size
            computed += size * (layer.mlp.routed_share if linear.weight in layer.mlp.routed else 1)
    return PASS_TOKENS * read / computed


def checked_tokens(refused: float, pass_cost: float) -> int:
    """Return the number of tokens of an answer to compute in a pass.

    Args:
        refused: the share of drafted tokens that are refused, above 0.
        pass_cost: the cost of a pass in tokens of this answer: w above.
    """
    best = math.sqrt(2 * pass_cost / refused)
    return max(1, int(min(best, max(_MOST_REFUSED / refused, _FEW))))


class DraftLengths:
    """The lengths of the drafts of several answers, from how many of their tokens were refused so far."""

    def __init__(self, answers: int, pass_tokens: float = PASS_TOKENS) -> None:
        """Begin with nothing seen; a pass costs as much as computing ``pass_tokens`` tokens."""
        self._pass_tokens = pass_tokens
        self._seen = [0] * answers
        self._refused = [0] * answers

    def see(self, answer: int, agreed: int, refused: bool) -> None:
        """Count ``agreed`` drafted tokens of an answer, and one that was refused, if it was."""
        self._seen[answer] += agreed + refused
        self._refused[answer] += refused

    def share(self, answer: int) -> float:
        """Return the share of drafted tokens of an answer that is expected to be refused."""
        everywhere = (sum(self._refused) + _ASSUMED * _ASSUMED_TOKENS) / (sum(self._seen) + _ASSUMED_TOKENS)
        return (self._refused[answer] + _OWN_TOKENS * everywhere) / (self._seen[answer] + _OWN_TOKENS)

    def checked(self, answer: int, unfinished: int) -> int:
        """Return how many tokens of an answer to compute in a pass for ``unfinished`` answers, one of them no draft."""
        return checked_tokens(self.share(answer), self._pass_tokens / unfinished)

    def drafted(self, answer: int, unfinished: int) -> int:
        """Return how many tokens to draft at a time: up to where one is expected to be refused, or to be checked.

        A drafting model has to read the whole text again each time, and what is checked later need not be drafted anew.
        """
        return max(self.checked(answer, unfinished), math.ceil(1 / self.share(answer)))
