"""The model ``glmexport`` of EleutherAI's lm-evaluation-harness: a bundle, or a checkpoint in its own precision.

lm-eval finds models by a registry that nothing outside of it is entered in by itself, so its command line is run from
here, with the model registered::

    python -m glmexport.lm_eval --model glmexport --model_args bundle=DIR --tasks NAME --include_path FOLDER
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry

from glmexport.answering import (
    Ending,
    Prompt,
    Stream,
    fits_in_memory,
    streamed_answers,
    verified_texts,
    whole_stream,
)
from glmexport.architecture import Reference
from glmexport.bundle import read_manifest, verify_files
from glmexport.checkpoint import Tokenizer
from glmexport.cli.console import Terminal
from glmexport.cli.main import tell
from glmexport.errors import GlmexportError, InputError
from glmexport.job import Original
from glmexport.likelihood import (
    Likelihood,
    Request,
    bundle_likelihoods,
    checkpoint_likelihoods,
    fitted,
    windows,
)
from glmexport.progress import Progress
from glmexport.validation.generation import GenerationSession
from glmexport.validation.machine import cores
from glmexport.validation.session import ScoringSession

_NAME = "glmexport"
#: By a name and not the class: run as a program this module is there twice.
model_registry.register(_NAME, target="glmexport.lm_eval:Model")

Conversation = Sequence[Mapping[str, str]]


class Answerer(Protocol):
    """What a bundle and a checkpoint have in common."""

    tokenizer: Tokenizer
    context_length: int
    digest: str

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Of every request, each of which the model can read."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """To every prompt, for the longest of which there is room."""


class Bundle:
    """A bundle as it is deployed: scoring.onnx for likelihoods, onnxruntime-genai for answers.

    Raises:
        BundleError: its files are not those of its manifest.
    """

    def __init__(self, directory: Path, threads: int, progress: Progress) -> None:
        self._directory, self._threads, self._progress = directory, threads, progress
        self._manifest = read_manifest(directory)
        verify_files(directory, self._manifest)
        self.tokenizer = Tokenizer.open(directory)
        self.context_length = self._manifest.context_length
        self.digest = self._manifest.digest()

    @cached_property
    def _scoring(self) -> ScoringSession:
        return ScoringSession(self._directory, self._manifest, self._threads)

    @cached_property
    def _generation(self) -> GenerationSession:
        return GenerationSession(self._directory, self._threads)

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """By scoring.onnx."""
        return bundle_likelihoods(self._scoring, requests, self._progress)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """By onnxruntime-genai."""
        session = self._generation
        return streamed_answers(session.stream, self.tokenizer, session.ends, prompts, self._progress)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """What it goes on with."""
        return self._generation.stream(prompt, max_tokens)


class Whole:
    """A checkpoint in transformers' arithmetic, in fp32.

    Likelihoods are computed one block at a time. Answers are those of transformers' whole model where it fits into the
    memory that is free, and else checked in passes through the blocks, by ``drafts`` if there are any.
    """

    def __init__(self, original: Original, threads: int, drafts: Bundle | None, progress: Progress) -> None:
        import torch

        torch.set_num_threads(threads)
        self._original, self._drafts, self._progress = original, drafts, progress
        self._reference = Reference(original.checkpoint, original.architecture)
        self.tokenizer = original.tokenizer
        self.context_length = original.architecture.context_length
        self.digest = original.checkpoint.digest(progress)

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Block by block."""
        with _scratch() as folder:
            return checkpoint_likelihoods(self._reference, requests, folder, self._progress)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Of the whole model, or block by block."""
        if self._drafts is None and self._whole is not None:
            ends = self._original.architecture.eos_token_ids
            return streamed_answers(self._whole, self.tokenizer, ends, prompts, self._progress)
        drafts = self._drafts.stream if self._drafts else None
        with _scratch() as folder:
            return verified_texts(self._reference, self.tokenizer, prompts, folder, self._progress, drafts)

    @cached_property
    def _whole(self) -> Stream | None:
        if not fits_in_memory(self._original.checkpoint):
            self._progress.remark("The checkpoint is asked block by block; drafts=BUNDLE makes that fewer passes.")
            return None
        return whole_stream(self._original.checkpoint, self._original.architecture.eos_token_ids)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Settings:
    """What can be given in ``--model_args``."""

    #: A bundle's directory; either this or a checkpoint is given.
    bundle: str | None = None
    #: A directory, a hub id or ``demo``.
    checkpoint: str | None = None
    #: What is merged into the checkpoint.
    adapter: str | None = None
    #: A bundle of the checkpoint, which drafts its answers.
    drafts: str | None = None
    #: None: the physical cores.
    threads: int | None = None
    #: Tokens of an answer where a task has no limit.
    max_gen_toks: int = 256
    #: lm-eval's own; each text is asked by itself.
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    device: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """Checked.

        Raises:
            InputError: an unknown one, a value that cannot be used, or not exactly one model.
        """
        unknown = sorted(set(arguments) - set(cls.__dataclass_fields__))
        if unknown:
            known = "bundle, checkpoint, adapter, drafts, threads and max_gen_toks"
            raise InputError(f"--model_args has {', '.join(unknown)}, which is unknown.", next_step=f"Use {known}.")
        settings = cls(**arguments)
        if (settings.bundle is None) == (settings.checkpoint is None):
            raise InputError(
                "One model is needed.", next_step="Give --model_args bundle=DIR, or --model_args checkpoint=DIR."
            )
        if settings.bundle is not None and (settings.adapter or settings.drafts):
            raise InputError(
                "adapter and drafts are for a checkpoint.", next_step="Leave them out, or give checkpoint=DIR."
            )
        if str(settings.batch_size or 1) != "1" or settings.device not in (None, "cpu"):
            raise InputError(
                f"--batch_size {settings.batch_size or 1} and --device {settings.device or 'cpu'} are not to be had.",
                next_step="Leave them out: texts are asked one by one, on the bundle's provider.",
            )
        for name, count in (("threads", settings.threads), ("max_gen_toks", settings.max_gen_toks)):
            if count is not None and (type(count) is not int or count < 1):
                raise InputError(f"{name} is {count!r}.", next_step="Give a whole number above 0.")
        return settings

    def open(self, progress: Progress) -> Answerer:
        """The model that is asked."""
        threads = self.threads or cores()
        if self.bundle is not None:
            return Bundle(Path(str(self.bundle)), threads, progress)
        assert self.checkpoint is not None
        drafts = Bundle(Path(str(self.drafts)), threads, progress) if self.drafts else None
        return Whole(Original.open(str(self.checkpoint), progress, self.adapter), threads, drafts, progress)


class Model(LM):  # type: ignore[misc]
    """Likelihoods and greedy answers for lm-eval.

    Every text begins with what the model's texts begin with (``[gMASK]<sop>``), be it cut or not. Contexts that are
    too long are cut from the left, as lm-eval's own models do, and their number is told.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._progress = Terminal()
        self._settings = Settings.of(arguments)
        self._answerer = self._settings.open(self._progress)
        self._tokenizer = self._answerer.tokenizer
        self._prefix = tuple(self._tokenizer.prefix or [0])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of every (context, continuation): nats, and whether greedy decoding would have given it."""
        asked = [self._request(*request.args) for request in requests]
        window = self._answerer.context_length
        fitting = [fitted(request, self._prefix, window) for request in asked]
        self._tell_cut(sum(a is not b for a, b in zip(asked, fitting, strict=True)))
        found = [(each.log_p, each.greedy) for each in self._answerer.likelihoods(fitting)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of every text, nats, in windows where it is too long."""
        window, prefix = self._answerer.context_length, self._prefix
        tokens = [self._encoded(*request.args)[len(prefix) :] for request in requests]
        texts = [list(windows(text, prefix, window)) for text in tokens]
        found = iter(self._answerer.likelihoods([part for parts in texts for part in parts]))
        sums = [sum((next(found).log_p for _ in parts), 0.0) for parts in texts]
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to every (context, settings).

        Raises:
            InputError: the settings ask for another answer than that.
        """
        asked = [
            Prompt(self._encoded(context), Ending.of(settings, self._settings.max_gen_toks))
            for context, settings in (request.args for request in requests)
        ]
        fitting = [prompt.fitted(self._prefix, self._answerer.context_length) for prompt in asked]
        self._tell_cut(sum(a is not b for a, b in zip(asked, fitting, strict=True)))
        found = self._answerer.answers(fitting)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
        """The conversation as the checkpoint's template writes it; without a prompt to answer its last turn is open.

        Raises:
            CheckpointError: there is no template, or it refuses.
        """
        text = self._tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        if last not in text:
            raise InputError(
                "The chat template does not show the last message as it is.",
                next_step="Run the task without a prefix of the answer (gen_prefix).",
            )
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the template, for lm-eval's records; None if none is to be used.

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
        """Another for every tokenizer and template, so that lm-eval keeps their requests apart."""
        digest = hashlib.sha256()
        for path in self._tokenizer.files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{_NAME}-{digest.hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, str]:
        """What was asked, for lm-eval's records."""
        return {"model_digest": self._answerer.digest}

    def _request(self, context: str, continuation: str) -> Request:
        """Encoded together and parted behind the context; white space at its end belongs to the continuation."""
        before, whole = self._encoded(context.rstrip()), self._encoded(context + continuation)
        return Request(before, whole[len(before) :])

    def _encoded(self, text: str) -> tuple[int, ...]:
        """With the prefix, unless it is written out, as a chat template does."""
        ids = self._tokenizer.encode(text)
        return tuple(ids) if tuple(ids[: len(self._prefix)]) == self._prefix else (*self._prefix, *ids)

    def _tell_cut(self, count: int) -> None:
        if count:
            self._progress.remark(f"{count} contexts were cut from the left, behind {len(self._prefix)} tokens.")


def main() -> None:
    """lm-eval's command line with this model; what is wrong with the model is told in a sentence."""
    try:
        cli_evaluate()
    except GlmexportError as error:
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
