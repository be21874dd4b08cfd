"""The model that the harness evaluates: a bundle, or a checkpoint in its own precision, opened by arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import InputError
from glmexport.foundation.machine import cores
from glmexport.foundation.progress import Progress
from glmexport.lm_eval.answering import Prompt, Stream, fits_in_memory, streamed_answers, verified_texts, whole_stream
from glmexport.lm_eval.likelihood import Likelihood, Request, bundle_likelihoods, checkpoint_likelihoods
from glmexport.reference.reference import Reference
from glmexport.release.opening import NOBODY, Trust, open_signed
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.workflows.original import Original


class EvaluatedModel(Protocol):
    """A bundle or a checkpoint that can be asked for likelihoods and answers."""

    tokenizer: Tokenizer
    context_length: int
    digest: str

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Return the likelihood of every request, each of which the model can read."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answer to every prompt; there is room for the longest one."""


class EvaluatedBundle:
    """A bundle as it is deployed: scoring.onnx for likelihoods, onnxruntime-genai for answers.

    Raises:
        BundleError: its files are not those of its manifest.
        UnverifiedError: it is not what was signed, or nobody of ``trust`` signed it.
    """

    def __init__(self, directory: Path, threads: int, progress: Progress, trust: Trust = NOBODY) -> None:
        self._bundle, self._threads, self._progress = open_signed(directory, trust, progress), threads, progress
        self.tokenizer = self._bundle.tokenizer
        self.context_length = self._bundle.manifest.context_length
        self.digest = self._bundle.digest

    @cached_property
    def _scoring(self) -> ScoringSession:
        return ScoringSession(self._bundle, self._threads)

    @cached_property
    def _generation(self) -> GenerationSession:
        return GenerationSession.open(self._bundle, self._threads)

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Return the likelihood of every request by scoring.onnx."""
        return bundle_likelihoods(self._scoring, requests, self._progress)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answer to every prompt by onnxruntime-genai."""
        session = self._generation
        return streamed_answers(session.stream, self.tokenizer, session.ends, prompts, self._progress)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Yield the tokens that follow the prompt."""
        return self._generation.stream(prompt, max_tokens)


class EvaluatedCheckpoint:
    """A checkpoint in transformers' arithmetic, in fp32.

    Likelihoods are computed one block at a time. Answers are those of transformers' whole model where it fits into the
    memory that is free, and else checked in passes through the blocks, by ``drafts`` if there are any.
    """

    def __init__(self, original: Original, threads: int, drafts: EvaluatedBundle | None, progress: Progress) -> None:
        torch.set_num_threads(threads)
        self._original, self._drafts, self._progress = original, drafts, progress
        self._reference = Reference(original.checkpoint, original.architecture)
        self.tokenizer = original.tokenizer
        self.context_length = original.architecture.context_length
        self.digest = original.checkpoint.digest(progress)

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Return the likelihood of every request, computed block by block."""
        with _scratch() as folder:
            return checkpoint_likelihoods(self._reference, requests, folder, self._progress)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answer to every prompt by the whole model, or block by block."""
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
class HarnessArguments:
    """The arguments that can be given, by name."""

    #: The directory of a bundle; either this or a checkpoint is given.
    bundle: str | None = None
    #: A directory, a hub id or ``demo``.
    checkpoint: str | None = None
    #: The adapter that is merged into the checkpoint.
    adapter: str | None = None
    #: A bundle of the checkpoint, which drafts its answers.
    drafts: str | None = None
    #: The public key of the signer of the bundle.
    key: str | None = None
    #: The root certificate of the signer of the bundle.
    root: str | None = None
    #: The subject that the signing certificate must have, with a root.
    subject: str | None = None
    #: Number of threads; None: the number of physical cores.
    threads: int | None = None
    #: Most tokens of an answer where a task has no limit.
    max_gen_toks: int = 256
    #: Arguments of lm-eval itself. Each text is asked by itself; the device, which it always gives, is the bundle's
    #: provider.
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    device: str | None = None

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> HarnessArguments:
        """Read and check ``arguments``.

        Raises:
            InputError: one is unknown, a value cannot be used, or there is not exactly one model.
        """
        unknown = sorted(set(arguments) - set(cls.__dataclass_fields__))
        if unknown:
            known = "bundle, checkpoint, adapter, drafts, key, root, subject, threads and max_gen_toks"
            raise InputError(
                f"The arguments of the model have {', '.join(unknown)}, which is unknown.", next_step=f"Use {known}."
            )
        settings = cls(**arguments)
        if (settings.bundle is None) == (settings.checkpoint is None):
            raise InputError("One model is needed.", next_step="Give bundle=DIR, or checkpoint=DIR.")
        if settings.bundle is not None and (settings.adapter or settings.drafts):
            raise InputError(
                "adapter and drafts are for a checkpoint.", next_step="Leave them out, or give checkpoint=DIR."
            )
        if str(settings.batch_size or 1) != "1":
            raise InputError(
                f"--batch_size {settings.batch_size} is not to be had.",
                next_step="Leave it out: texts are asked one by one.",
            )
        for name, count in (("threads", settings.threads), ("max_gen_toks", settings.max_gen_toks)):
            if count is not None and (type(count) is not int or count < 1):
                raise InputError(f"{name} is {count!r}.", next_step="Give a whole number above 0.")
        return settings

    def open(self, progress: Progress) -> EvaluatedModel:
        """Open the model that is asked."""
        threads = self.threads or cores()
        if self.bundle is not None:
            key, root = (Path(str(path)) if path else None for path in (self.key, self.root))
            return EvaluatedBundle(Path(str(self.bundle)), threads, progress, Trust(key, root, self.subject))
        assert self.checkpoint is not None
        drafts = EvaluatedBundle(Path(str(self.drafts)), threads, progress) if self.drafts else None
        original = Original.open(str(self.checkpoint), progress, self.adapter)
        return EvaluatedCheckpoint(original, threads, drafts, progress)
