"""Greedy answers up to a stop string: from a bundle, and from a checkpoint, whole in memory or block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.lm_eval.likelihood import TOKENS, portions
from glmexport.reference.reference import Reference
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.drafting import FREE, DraftCost
from glmexport.validation.behaviour.original import one_at_a_time, verified_answers

#: A function from a prompt and a limit to the tokens after the prompt, one by one, the end token included.
Stream = Callable[[Sequence[int], int], Iterator[int]]

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Settings that mean nothing to a greedy answer, once it is certain that one is wanted.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
#: Values with which these settings change nothing.
_NEUTRAL: Mapping[str, object] = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}
#: Share of the free memory that a whole model may take; the rest is for its caches.
_SHARE = 0.75
#: Number of last tokens of a text that are looked up in the text before, and number that are taken from there.
_LOOKED_UP, _TAKEN = 3, 16


@dataclass(frozen=True)
class Ending:
    """The conditions that end an answer, beside the model's end tokens."""

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def read(cls, settings: Mapping[str, Any], max_tokens: int) -> Ending:
        """Read the generation settings of lm-eval; ``max_tokens`` is used if they have no limit.

        Raises:
            InputError: they ask for another answer than the greedy one, or for something unknown.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, Sequence) or not all(isinstance(stop, str) and stop for stop in until):
            raise _refused(f"until={until!r}", "Give texts that are not empty.")
        limits = [given.pop(name) for name in _LIMITS if name in given] or [max_tokens]
        limit = limits[0]
        if not all(type(other) is int and other == limit > 0 for other in limits):
            raise _refused(f"a limit of {' and '.join(map(str, limits))} tokens", "Give one whole number above 0.")
        greedy = given.pop("do_sample", None)
        if greedy not in (None, False) or (greedy is None and given.get("temperature", 0) != 0):
            raise _refused("sampling", "Set do_sample to false: answers are the most likely ones, token by token.")
        for name, value in given.items():
            if name not in _OF_SAMPLING and (name not in _NEUTRAL or value != _NEUTRAL[name]):
                raise _refused(f"{name}={value!r}", "Leave it out: answers are the most likely ones, token by token.")
        return cls(tuple(until), limit)


def _refused(setting: str, next_step: str) -> InputError:
    return InputError(f"Answers cannot be generated with {setting}.", next_step=next_step)


@dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt, and the conditions that end its answer."""

    ids: tuple[int, ...]
    ending: Ending

    def fitted(self, prefix: Sequence[int], window: int) -> Prompt:
        """Return the prompt cut from the left, after ``prefix``, until the longest answer has room.

        Raises:
            InputError: the longest answer leaves no room for a prompt.
        """
        room = window - self.ending.max_tokens
        if len(self.ids) <= room:
            return self
        kept = len(prefix) if self.ids[: len(prefix)] == tuple(prefix) else 0
        if room <= kept:
            raise InputError(
                f"An answer of {self.ending.max_tokens} tokens leaves no room in a context of {window}.",
                next_step="Set max_gen_toks to less.",
            )
        return Prompt((*self.ids[:kept], *self.ids[len(self.ids) - room + kept :]), self.ending)


class Reading:
    """A reader of answers as text. A stop string that is a special token, which no text shows, is an end token."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], ending: Ending) -> None:
        special = tokenizer.special_tokens
        self._tokenizer = tokenizer
        self._ends = frozenset(ends) | {special[stop] for stop in ending.until if stop in special}
        self._until = [stop for stop in ending.until if stop not in special]

    def finished(self, tokens: Sequence[int]) -> bool:
        """Return whether an answer is finished."""
        return bool(tokens) and (tokens[-1] in self._ends or self._stop(self._tokenizer.decode(tokens)) is not None)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer up to the stop string or token that ended it."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._tokenizer.decode(tokens[:end])
        return text[: self._stop(text)]

    def _stop(self, text: str) -> int | None:
        """Return where the stop string begins that is complete first: later text then changes nothing."""
        found = [(place + len(stop), place) for stop in self._until if (place := text.find(stop)) >= 0]
        return min(found)[1] if found else None


def streamed_answers(
    stream: Stream, tokenizer: Tokenizer, ends: Collection[int], prompts: Sequence[Prompt], progress: Progress
) -> list[str]:
    """Answer one prompt after the other by the ``stream`` of a bundle or a whole checkpoint."""
    answers = []
    with progress.track("Answers", len(prompts)) as track:
        for prompt in prompts:
            reading = Reading(tokenizer, ends, prompt.ending)
            tokens: list[int] = []
            for token in stream(prompt.ids, prompt.ending.max_tokens):
                tokens.append(token)
                if reading.finished(tokens):
                    break
            answers.append(reading.text(tokens))
            track.advance()
    return answers


def verified_texts(
    reference: Reference,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    scratch: Path,
    progress: Progress,
    drafts: Stream | None = None,
) -> list[str]:
    """Return a checkpoint's answers, found in passes through it one block at a time, for all prompts together.

    Where they are too many for the disk, portions follow one another. ``drafts``, such as a bundle of the checkpoint,
    gives the tokens to check in a pass; without them they are those that followed an earlier occurrence of the last
    tokens (Saxena, Prompt Lookup Decoding, 2023). The answers are the same.
    """
    texts: list[str] = []
    for part in portions(prompts, lambda prompt: len(prompt.ids) + prompt.ending.max_tokens, TOKENS):
        texts += _verified(reference, tokenizer, part, scratch, progress, drafts)
    return texts


def _verified(
    reference: Reference,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    scratch: Path,
    progress: Progress,
    drafts: Stream | None,
) -> list[str]:
    ends = reference.architecture.eos_token_ids
    readings = [Reading(tokenizer, ends, prompt.ending) for prompt in prompts]

    def draft(index: int, so_far: list[int], most: int) -> list[int]:
        text = [*prompts[index].ids, *so_far]
        return list(drafts(text, most)) if drafts else looked_up(text)

    answers = verified_answers(
        reference,
        [prompt.ids for prompt in prompts],
        one_at_a_time(draft),
        limits=[prompt.ending.max_tokens for prompt in prompts],
        ends=ends,
        scratch=scratch,
        progress=progress,
        finished=lambda index, tokens: readings[index].finished(tokens),
        cost=DraftCost.by_bundle(1) if drafts else FREE,
    )
    return [reading.text(tokens) for reading, tokens in zip(readings, answers.tokens, strict=True)]


def looked_up(text: Sequence[int]) -> list[int]:
    """Return what followed the last tokens of ``text`` at an earlier place: the longest match, and the latest one."""
    for length in range(min(_LOOKED_UP, len(text) - 1), 0, -1):
        last = list(text[-length:])
        for start in range(len(text) - length - 1, -1, -1):
            if list(text[start : start + length]) == last:
                return list(text[start + length : start + length + _TAKEN])
    return []


def fits_in_memory(checkpoint: Checkpoint) -> bool:
    """Return whether transformers can hold a whole checkpoint in fp32.

    It cannot where something has to be merged or unpacked, which it does not read as we do.
    """
    if checkpoint.adapter or checkpoint.stored.layout:
        return False
    numbers = sum(tensor.elements for tensor in checkpoint.tensors.values())
    return bool(numbers * 4 <= _SHARE * psutil.virtual_memory().available)


def whole_stream(checkpoint: Checkpoint, ends: Collection[int]) -> Stream:
    """Return a stream of transformers' own model, cached and in fp32, without the checkpoint's generation settings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).eval()

    def stream(prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        ids, cache = torch.tensor([list(prompt)]), None
        for _ in range(max_tokens):
            with torch.inference_mode():
                output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            yield token
            if token in ends:
                return
            ids = torch.tensor([[token]])

    return stream
