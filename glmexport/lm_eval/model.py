"""The model ``glmexport`` of EleutherAI's lm-evaluation-harness: a bundle, or a checkpoint in its own precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from glmexport.cli.console import Terminal
from glmexport.foundation.errors import InputError
from glmexport.lm_eval.answering import Ending, Prompt
from glmexport.lm_eval.likelihood import Request, fitted, windows
from glmexport.lm_eval.subject import HarnessArguments
from glmexport.tokenizer.control import Rendered

NAME = "glmexport"

Conversation = Sequence[Mapping[str, str]]


class HarnessModel(LM):  # type: ignore[misc]
    """Likelihoods and greedy answers for lm-eval.

    Every text begins with the model's prefix (``[gMASK]<sop>``), whether it is cut or not. Contexts that are
    too long are cut from the left, as lm-eval's own models do, and their number is told.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._progress = Terminal()
        self._settings = HarnessArguments.read(arguments)
        self._subject = self._settings.open(self._progress)
        self._tokenizer = self._subject.tokenizer
        self._prefix = tuple(self._tokenizer.prefix or [0])
        #: Whether the chat template was asked for.
        self._rendered = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, for every (context, continuation), nats and whether greedy decoding would have given it."""
        asked = [self._request(*request.args) for request in requests]
        window = self._subject.context_length
        fitting = [fitted(request, self._prefix, window) for request in asked]
        self._tell_cut(sum(a is not b for a, b in zip(asked, fitting, strict=True)))
        found = [(each.log_p, each.greedy) for each in self._subject.likelihoods(fitting)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the nats of every text, in windows where it is too long."""
        window, prefix = self._subject.context_length, self._prefix
        tokens = [self._sequence(*request.args)[len(prefix) :] for request in requests]
        texts = [list(windows(text, prefix, window)) for text in tokens]
        found = iter(self._subject.likelihoods([part for parts in texts for part in parts]))
        sums = [sum((next(found).log_p for _ in parts), 0.0) for parts in texts]
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answer to every (context, settings).

        Raises:
            InputError: the settings ask for another answer than that.
        """
        asked = [
            Prompt(self._sequence(context), Ending.read(settings, self._settings.max_gen_toks))
            for context, settings in (request.args for request in requests)
        ]
        fitting = [prompt.fitted(self._prefix, self._subject.context_length) for prompt in asked]
        self._tell_cut(sum(a is not b for a, b in zip(asked, fitting, strict=True)))
        found = self._subject.answers(fitting)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
        """Return the conversation as the template writes it; without a prompt to answer, its last turn is open.

        Raises:
            CheckpointError: there is no template, or it refuses.
        """
        text = self._tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
        self._rendered = True
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        if last not in text:
            raise InputError(
                "The chat template does not show the last message as it is.",
                next_step="Run the task without a prefix of the answer (gen_prefix).",
            )
        return text.until(text.rindex(last) + len(last))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the template, for lm-eval's records; None if none is to be used.

        Raises:
            InputError: one is asked for by name.
        """
        if isinstance(chat_template, str):
            raise InputError(
                f"The chat template {chat_template!r} cannot be chosen.",
                next_step="Give --apply_chat_template without a name.",
            )
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name for each tokenizer and template, so that lm-eval keeps their requests apart.

        In the requests that it keeps, a rendered conversation has its control tokens.
        """
        digest = hashlib.sha256()
        for path in self._tokenizer.files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{NAME}-control-{digest.hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, str]:
        """Return the model that was asked, for lm-eval's records."""
        return {"model_digest": self._subject.digest}

    def _request(self, context: str, continuation: str) -> Request:
        """Encode both as one text and split it after the context; white space there belongs to the continuation."""
        before, whole = self._sequence(context.rstrip()), self._sequence(context + continuation)
        return Request(before, whole[len(before) :])

    def _sequence(self, text: str) -> tuple[int, ...]:
        """Return token ids with the prefix; only text that the chat template wrote becomes control tokens.

        Raises:
            InputError: lm-eval has changed a text that the template wrote.
        """
        plain = self._rendered and not isinstance(text, Rendered)
        if plain and self._tokenizer.prefix and text.startswith(self._tokenizer.decode(self._prefix, False)):
            raise InputError(
                "lm-eval has changed a rendered conversation, so that its control tokens are no longer known.",
                next_step="Run the task without --apply_chat_template.",
            )
        return tuple(self._tokenizer.sequence(text, judged=True))

    def _tell_cut(self, count: int) -> None:
        if count:
            self._progress.remark(f"{count} contexts were cut from the left, behind {len(self._prefix)} tokens.")
