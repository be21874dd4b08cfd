"""The speed of candidates beside the start: the same prompts in turns, each side in processes of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from glmexport.foundation.evidence import Gain, Gains, Preference
from glmexport.results.performance import Interval
from glmexport.tuning.slices import Slices
from glmexport.validation import bootstrap
from glmexport.validation.runtimes import Round, RuntimeRequest
from glmexport.validation.speed import Worker

#: Seconds between turns: threads of the one before spin a little before they sleep.
_PAUSE = 0.05


@dataclass(frozen=True)
class Workload:
    """The work that is timed: the prompt, a token after all of it, and one after its first ``short`` tokens."""

    prompt: tuple[int, ...]
    short: int
    generated: int


@dataclass(frozen=True)
class Times:
    """Seconds of the whole model in one round."""

    decode: float
    decode_long: float
    prefill: float

    def cost(self, prefer: Preference) -> float:
        """Return what a tuning makes small: a geometric mean of the seconds that ``prefer`` names."""
        decode = math.sqrt(self.decode * self.decode_long)
        return {"decode": decode, "prefill": self.prefill, "balanced": math.sqrt(decode * self.prefill)}[prefer]


#: The times of start and candidate in the same round.
Pair = tuple[Times, Times]


class Side:
    """One setting that is loaded in a process for each slice."""

    def __init__(self, bundles: Sequence[Path], threads: int, slices: Slices, workload: Workload) -> None:
        self._slices = slices
        self._workload = workload
        with ExitStack() as stack:
            self._workers = [
                stack.enter_context(
                    Worker(
                        RuntimeRequest(
                            runtime="onnxruntime-genai",
                            directory=str(bundle),
                            prompt=workload.prompt,
                            generated_tokens=workload.generated,
                            threads=threads,
                        )
                    )
                )
                for bundle in bundles
            ]
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self) -> Times:
        """Take one turn: every slice generates after the short prompt and after the long one."""
        short, long = [], []
        for worker in self._workers:
            time.sleep(_PAUSE)
            short.append(worker.ask(f"generate {self._workload.short}", Round))
            long.append(worker.ask("generate", Round))
        return Times(
            decode=self._slices.whole([_step(taken) for taken in short]),
            decode_long=self._slices.whole([_step(taken) for taken in long]),
            prefill=self._slices.whole([taken.ttft_s for taken in long]),
        )


def take_pairs(start: Side, candidate: Side, rounds: int, seconds: float = 0) -> list[Pair]:
    """Take ``rounds`` rounds, an even number, in the order ABBA, and further ones until ``seconds`` have passed."""
    pairs: list[Pair] = []
    begun = time.monotonic()
    while len(pairs) < rounds or len(pairs) % 2 or time.monotonic() - begun < seconds:
        if len(pairs) % 2 == 0:
            first = start.take()
            pairs.append((first, candidate.take()))
        else:
            second = candidate.take()
            pairs.append((start.take(), second))
    return pairs


def gains_of(pairs: Sequence[Pair], prefer: Preference, confidence: float) -> Gains:
    """Return the speed of the candidate over that of the start."""

    def gain(seconds: Callable[[Times], float]) -> Gain:
        # The candidate is faster by the seconds of the start over its own.
        return _gain(bootstrap.ratio([seconds(a) for a, _ in pairs], [seconds(b) for _, b in pairs], confidence))

    return Gains(
        decode=gain(lambda times: times.decode),
        decode_long=gain(lambda times: times.decode_long),
        prefill=gain(lambda times: times.prefill),
        preferred=gain(lambda times: times.cost(prefer)),
        rounds=len(pairs),
    )


def as_numbers(pairs: Sequence[Pair]) -> list[list[list[float]]]:
    """Return pairs as numbers for a work directory: [rounds][start, candidate][decode, decode_long, prefill]."""
    return [[list(astuple(times)) for times in pair] for pair in pairs]


def from_numbers(numbers: Sequence[Sequence[Sequence[float]]]) -> list[Pair]:
    """Return the pairs of which ``as_numbers`` made ``numbers``."""
    return [(Times(*first), Times(*second)) for first, second in numbers]


def _gain(interval: Interval) -> Gain:
    told = interval.n >= bootstrap.rounds_for_bounds(interval.confidence)
    return Gain(
        ratio=interval.value, lower=interval.lower if told else None, upper=interval.upper if told else None
    )


def _step(taken: Round) -> float:
    return sum(taken.steps_s) / len(taken.steps_s)
