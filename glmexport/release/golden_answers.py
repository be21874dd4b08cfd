"""Comparison with golden answers by the standard library alone: servers that have nothing else judge by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def difference(
    expected: Mapping[str, Any],
    tokens: Sequence[int],
    logprobs: Sequence[Mapping[int, float]],
    tolerance: float,
) -> str | None:
    """Return why what a device answered to the same prompt is not the golden answer; None if it is.

    As long as the tokens agree, their log-probabilities have to within ``tolerance``. At the first that differs the
    golden one has to be among the device's most likely, and within ``tolerance`` of the one it chose: then two were
    nearly equal. What follows it follows another text and is not compared.

    Args:
        expected: one of the answers of golden.json: its ``language``, and of its ``steps`` each ``token`` and
            ``logprob``.
        tokens: what the device answered.
        logprobs: of each of them, the log-probabilities of that token and of the most likely ones.
        tolerance: nats.
    """
    steps = expected["steps"]
    for index, step in enumerate(steps):
        where = f"In {expected['language']}, at token {index + 1} of {len(steps)}"
        if index >= min(len(tokens), len(logprobs)):
            return f"{where}: the answer ends before it."
        token, likely = tokens[index], logprobs[index]
        if token not in likely or step["token"] not in likely:
            return f"{where}: {token} instead of {step['token']}, which is not among the most likely."
        # Written so that NaN is no agreement.
        if token != step["token"]:
            apart = likely[token] - likely[step["token"]]
            if apart <= tolerance:
                return None
            return f"{where}: {token} instead of {step['token']}, which is {apart:.2f} nats less likely."
        apart = abs(likely[token] - step["logprob"])
        if not apart <= tolerance:
            return (
                f"{where}: the log-probability of {token} differs by {apart:.2f} nats, and {tolerance:g} are allowed."
            )
    return None
