"""golden.json holds prompts, and what the bundle answered to them where it was signed.

A device that answers otherwise runs something else: another model, a broken kernel, a damaged file. It need not answer
to the last bit, as runtimes and processors add in different orders; so distributions are compared, with a tolerance,
and only as long as both have read the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.foundation.definition import Definition
from glmexport.foundation.host import Host
from glmexport.foundation.progress import Progress
from glmexport.release.golden_answers import difference
from glmexport.tokenizer.tokenizer import Tokenizer

GOLDEN = "golden.json"
TOKENS = 16
TOP = 5
#: Tolerance in nats. Kernels that quantize activations differ by a few hundredths from those that do not; a wrong
#: weight, template or rotation by several.
TOLERANCE = 0.5
#: The length of the beginning of each text that becomes a prompt.
_CHARACTERS = 160


@dataclass(frozen=True)
class GoldenText:
    """A text whose beginning becomes a prompt."""

    #: BCP-47 tag.
    language: str
    text: str


class GoldenStep(Definition):
    """One token of an answer, its log-probability in nats, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class GoldenAnswer(Definition):
    """A prompt in token ids, and the greedy answer to it, its end token included."""

    language: str
    prompt: tuple[int, ...]
    steps: tuple[GoldenStep, ...]


class Golden(Definition):
    """The content of golden.json."""

    format: Literal["glmexport-golden"] = "glmexport-golden"
    version: Literal[1] = 1
    glmexport: str
    #: The execution provider of the recording, and the type of the processor.
    provider: str
    machine: str
    #: Nats that an answer of another device may differ by.
    tolerance: float = TOLERANCE
    answers: tuple[GoldenAnswer, ...]


def absent_because(bundle: Bundle) -> str | None:
    """Return why nothing can be recorded of ``bundle`` on this machine; None if it can."""
    if bundle.runs_here:
        return None
    return f"The bundle does not run where it was signed. {' '.join(bundle.target.lacking(Host.this()))}"


def record(bundle: Bundle, texts: Sequence[GoldenText], threads: int, progress: Progress) -> Golden:
    """Return what the bundle answers, greedily, to the beginning of each of ``texts``.

    Raises:
        MachineError: this ONNX Runtime has no execution provider of the bundle's.
        BundleError: its loop cannot load it.
    """
    session = GenerationSession.open(bundle, threads)
    answers = []
    with progress.track("golden answers", len(texts)) as track:
        for each in texts:
            prompt = golden_prompt(bundle.tokenizer, each.text[:_CHARACTERS], session.context_length - TOKENS)
            steps = tuple(_step(logits) for logits in session.distributions(prompt, TOKENS))
            answers.append(GoldenAnswer(language=each.language, prompt=tuple(prompt), steps=steps))
            track.advance(detail=each.language)
    return Golden(
        glmexport=__version__,
        provider=bundle.target.provider.name,
        machine=Host.this().machine,
        answers=tuple(answers),
    )


def compare(
    golden_answer: GoldenAnswer,
    got_tokens: Sequence[int],
    got_logprobs: Sequence[Mapping[int, float]],
    tolerance: float = TOLERANCE,
) -> str | None:
    """Return why what a device answered to the same prompt is not the golden answer; None if it is.

    ``got_logprobs``: of each of ``got_tokens``, the log-probabilities of that token and of the most likely ones. See
    ``difference``.
    """
    return difference(golden_answer.model_dump(), got_tokens, got_logprobs, tolerance)


def golden_prompt(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
    """Return the token ids of ``text`` as a prompt, by the chat template if there is one, ``longest`` at the most."""
    if tokenizer.has_chat_template:
        ids = tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
    else:
        ids = tokenizer.sequence(text)
    return ids if len(ids) <= longest or len(text) < 2 else golden_prompt(tokenizer, text[: len(text) // 2], longest)


def _step(logits: NDArray[np.float32]) -> GoldenStep:
    values = logits.astype(np.float64)
    logprobs = values - values.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    most = np.argsort(-logprobs, kind="stable")[:TOP]
    top = tuple((int(token), round(float(logprobs[token]), 6)) for token in most)
    return GoldenStep(token=top[0][0], logprob=top[0][1], top=top)
