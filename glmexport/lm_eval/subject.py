"""What is asked by others' programs: a bundle, or a checkpoint in its own precision, opened by arguments in words."""

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


class Subject(Protocol):
    """What a bundle and a checkpoint have in common."""

    tokenizer: Tokenizer
    context_length: int
    digest: str

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Of every request, each of which the model can read."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """To every prompt, for the longest of which there is room."""


class BundleSubject:
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
        """By scoring.onnx."""
        return bundle_likelihoods(self._scoring, requests, self._progress)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """By onnxruntime-genai."""
        session = self._generation
        return streamed_answers(session.stream, self.tokenizer, session.ends, prompts, self._progress)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """What it goes on with."""
        return self._generation.stream(prompt, max_tokens)


class CheckpointSubject:
    """A checkpoint in transformers' arithmetic, in fp32.

    Likelihoods are computed one block at a time. Answers are those of transformers' whole model where it fits into the
    memory that is free, and else checked in passes through the blocks, by ``drafts`` if there are any.
    """

    def __init__(self, original: Original, threads: int, drafts: BundleSubject | None, progress: Progress) -> None:
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
    """What can be given, by name."""

    #: A bundle's directory; either this or a checkpoint is given.
    bundle: str | None = None
    #: A directory, a hub id or ``demo``.
    checkpoint: str | None = None
    #: What is merged into the checkpoint.
    adapter: str | None = None
    #: A bundle of the checkpoint, which drafts its answers.
    drafts: str | None = None
    #: Public key, or root certificate, of who signed the bundle.
    key: str | None = None
    root: str | None = None
    #: With a root: whom the signing certificate has to be of.
    subject: str | None = None
    #: None: the physical cores.
    threads: int | None = None
    #: Tokens of an answer where a task has no limit.
    max_gen_toks: int = 256
    #: lm-eval's own. Each text is asked by itself; the device, which it always gives, is the bundle's provider.
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

    def open(self, progress: Progress) -> Subject:
        """The model that is asked."""
        threads = self.threads or cores()
        if self.bundle is not None:
            key, root = (Path(str(path)) if path else None for path in (self.key, self.root))
            return BundleSubject(Path(str(self.bundle)), threads, progress, Trust(key, root, self.subject))
        assert self.checkpoint is not None
        drafts = BundleSubject(Path(str(self.drafts)), threads, progress) if self.drafts else None
        return CheckpointSubject(Original.open(str(self.checkpoint), progress, self.adapter), threads, drafts, progress)
