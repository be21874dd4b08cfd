"""The number of drafted tokens that a pass through the original checks, from what passes, tokens and drafts cost.

A token that is drafted and refused was computed in vain; a pass reads the whole checkpoint, however few tokens it
computes. With a share r of drafted tokens refused, and n tokens computed a pass, an answer gains
(1 - (1 - r)^n) / r tokens (Leviathan et al., arXiv 2211.17192, equation 1). If a pass costs as much as w more tokens of
each answer, one token of it costs (w + n) r / (1 - (1 - r)^n), which for small n r is about (1 + w / n) (1 + n r / 2),
and least at n = sqrt(2 w / r).

A draft costs what the model that drafts reads and computes. Where many answers share the passes, it is cheaper to let
the original go on by itself, a token a pass: with w = 1/3 a token costs 1 1/3, and a draft has to be computed and
checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
#: Number of tokens that the original computes while a bundle reads its weights for one step: about 0.15 ns a byte, of
#: half a byte a weight, where a multiply-add takes 0.01 ns.
_STEP_TOKENS = 6.0


@dataclass(frozen=True)
class DraftCost:
    """The cost of a new draft, in tokens that the original computes."""

    #: The cost of each token of the text before it, which is computed again.
    text: float = 0.0
    #: The cost of each drafted token.
    token: float = 0.0

    @classmethod
    def by_bundle(cls, batch: int) -> DraftCost:
        """Return that of a bundle that computes ``batch`` answers in a step; 0 or 1: each alone."""
        return cls(1.0, 1.0 + _STEP_TOKENS / batch if batch > 1 else _STEP_TOKENS)


#: The cost of drafts that are known already.
FREE = DraftCost()


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


def gained_tokens(refused: float, count: int) -> float:
    """Return how many tokens an answer gains by ``count`` computed ones: those that it agrees with, and the next."""
    return float((1 - (1 - refused) ** count) / refused)


class DraftLengths:
    """The lengths of the drafts of several answers, from how many of their tokens were refused so far."""

    def __init__(self, answers: int, pass_tokens: float = PASS_TOKENS, cost: DraftCost = FREE) -> None:
        """Begin with nothing seen; a pass costs as much as computing ``pass_tokens`` tokens, a new draft ``cost``."""
        self._pass_tokens, self._cost = pass_tokens, cost
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

    def worthwhile(self, answer: int, unfinished: int, text: int, room: int) -> bool:
        """Return whether a new draft is expected to cost less than passes that gain a token each.

        Args:
            answer: the index of the answer.
            unfinished: the number of answers that share what a pass costs.
            text: the number of tokens of the text so far.
            room: the most tokens that the answer may still gain.
        """
        share, pass_cost = self.share(answer), self._pass_tokens / unfinished
        drafted, checked = (min(room, count(answer, unfinished)) for count in (self.drafted, self.checked))
        gained = gained_tokens(share, drafted)
        passes = gained / gained_tokens(share, checked)
        cost = self._cost.text * text + self._cost.token * drafted + passes * (pass_cost + checked)
        return cost < gained * (pass_cost + 1)
