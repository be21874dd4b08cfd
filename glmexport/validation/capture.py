"""The original's answers, captured once and carried to wherever bundles of it run.

``reference.json`` records the texts and the model that was asked, and lists every file with its SHA-256. The files
below ``answers`` hold the token ids of each text and the partition of each judged position, ``audit.safetensors`` whole
logits of some.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmexport import __version__
from glmexport.bundle.manifest import FileEntry, Source
from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.foundation.machine import library_versions
from glmexport.foundation.progress import Progress
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.results.fidelity import CaptureBound, LanguageFidelity
from glmexport.results.reference import ReferenceCheck
from glmexport.validation.behaviour.questions import Question
from glmexport.validation.divergence import Divergence, divergence
from glmexport.validation.fidelity import Answers, Streamed, position_slices
from glmexport.validation.partition import Partition, partition, partition_divergence
from glmexport.validation.prompts import GoldenPrompt
from glmexport.validation.texts import EvaluationText

REFERENCE = "reference.json"
TOP_K = 1024

_AGAIN = "Copy the reference again, or capture it again."
_AUDIT = "audit.safetensors"
#: Number of positions a language, evenly over its first text, at which whole logits are kept.
_AUDIT_POSITIONS = 8


class CapturedText(Definition):
    """One text that was asked about."""

    document: str
    language: str
    prefix: int = Field(ge=1)
    #: Number of judged positions.
    positions: int = Field(ge=1)


class CapturedAnswer(Definition):
    """A prompt, and the original's own greedy answer with the end token, if it came."""

    question: Question
    tokens: tuple[int, ...] = Field(min_length=1)


class Capture(Definition):
    """The content of reference.json."""

    format: Literal["glmexport-reference"] = "glmexport-reference"
    version: Literal[1] = 1
    glmexport: str
    source: Source
    vocabulary_size: int = Field(ge=1)
    top_k: int = Field(ge=1)
    #: Mean probability of all other tokens.
    tail_mass: float
    texts: tuple[CapturedText, ...]
    #: Divergence of the original from itself, with another batch and number of threads.
    noise: LanguageFidelity
    #: Whether the original that was asked is the model that transformers loads.
    reference_check: ReferenceCheck | None = None
    #: The way in which its products were computed; captures of older versions lack the key.
    arithmetic: OriginalArithmetic | None = Field(default=None, exclude_if=lambda value: value is None)
    #: A string says why transformers cannot open the tokenizer; None without a chat template.
    prompts: tuple[GoldenPrompt, ...] | str | None
    #: None where no bundle was at hand to draft them.
    answers: tuple[CapturedAnswer, ...] | None = None
    versions: dict[str, str]
    files: tuple[FileEntry, ...]

    def digest(self) -> str:
        """Return the SHA-256 over its values, and so over every file it lists.

        The check is left out, as free memory decides whether it is made, and the arithmetic, whose speed is measured.
        """
        import hashlib

        content = self.model_dump_json(exclude={"reference_check", "arithmetic"})
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class OriginalFacts:
    """The part of a capture that is kept beside the answers to its texts.

    The fields are those of ``Capture``.
    """

    source: Source
    noise: LanguageFidelity
    reference_check: ReferenceCheck | None
    arithmetic: OriginalArithmetic
    prompts: Sequence[GoldenPrompt] | str | None
    answers: tuple[CapturedAnswer, ...] | None


def write_capture(
    directory: Path,
    original: Streamed,
    facts: OriginalFacts,
    progress: Progress,
    *,
    top_k: int = TOP_K,
) -> Capture:
    """Write the answers of ``original``, ``top_k`` tokens a position, and ``facts`` into the new ``directory``."""
    (directory / "answers").mkdir(parents=True)
    audit: dict[str, Tensor] = {}
    tail, positions = 0.0, 0
    with progress.track("Capturing", len(original.texts)) as track:
        for language, group in itertools.groupby(range(len(original.texts)), lambda i: original.texts[i].language):
            tensors: dict[str, Tensor] = {}
            for rank, index in enumerate(group):
                text, states = original.texts[index], original.states.states(index)
                slices = zip(original.logits(states), position_slices(text.positions), strict=True)
                kept = Partition.concatenate([partition(logits, text.targets[each], top_k) for logits, each in slices])
                tail += float(kept.log_tail.double().exp().sum())
                positions += text.positions
                tensors[f"{index}.ids"] = text.ids.int()
                tensors[f"{index}.tokens"] = kept.tokens.int()
                for name in ("log_probabilities", "log_tail", "nll"):
                    tensors[f"{index}.{name}"] = getattr(kept, name)
                if rank == 0:
                    chosen = torch.linspace(0, text.positions - 1, min(_AUDIT_POSITIONS, text.positions)).long()
                    audit[f"{index}.positions"] = chosen.int()
                    audit[f"{index}.logits"] = original.reference.logits(states[chosen])
                track.advance(1, language)
            save_file(tensors, directory / _answers(language))
    save_file(audit, directory / _AUDIT)
    prompts = facts.prompts
    capture = Capture(
        glmexport=__version__,
        source=facts.source,
        vocabulary_size=original.reference.architecture.vocabulary_size,
        top_k=top_k,
        tail_mass=tail / positions,
        texts=tuple(
            CapturedText(document=text.document, language=text.language, prefix=text.prefix, positions=text.positions)
            for text in original.texts
        ),
        noise=facts.noise,
        reference_check=facts.reference_check,
        arithmetic=facts.arithmetic,
        prompts=prompts if prompts is None or isinstance(prompts, str) else tuple(prompts),
        answers=facts.answers,
        versions=library_versions(),
        files=tuple(
            FileEntry(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=sha256(path))
            for path in sorted(directory.rglob("*.safetensors"))
        ),
    )
    (directory / REFERENCE).write_text(capture.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return capture


def _answers(language: str) -> str:
    return f"answers/{language}.safetensors"


@dataclass(frozen=True)
class CapturedReference:
    """The original as it was captured in ``directory``."""

    directory: Path
    capture: Capture

    @classmethod
    def open(cls, directory: Path) -> CapturedReference:
        """Open the capture in ``directory``; every file is read and checked.

        Raises:
            BundleError: it is no captured reference, or one of another version, or a file is missing or changed.
        """
        path = directory / REFERENCE
        if not path.is_file():
            raise BundleError(
                f"{directory} is not a captured reference: it has no {REFERENCE}.",
                next_step="Give a directory that glmexport reference wrote.",
            )
        try:
            capture = read_json(Capture, path)
        except ValueError as error:
            raise BundleError(
                f"{path}: {error}.",
                next_step="Capture the reference again with this version of glmexport.",
            ) from error
        needed = {_AUDIT, *(_answers(text.language) for text in capture.texts)}
        if needed != {entry.path for entry in capture.files}:
            raise BundleError(f"{path} does not list the files of its texts.", next_step=_AGAIN)
        for entry in capture.files:
            file = directory / entry.path
            if file.is_symlink() or not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
                raise BundleError(f"{file} is missing or not a real file.", next_step=_AGAIN)
            if file.stat().st_size != entry.size or sha256(file) != entry.sha256:
                raise BundleError(
                    f"{file} is not the file that {REFERENCE} lists (its sha256 differs).", next_step=_AGAIN
                )
        captured = cls(directory, capture)
        captured._check()
        return captured

    @cached_property
    def texts(self) -> Sequence[EvaluationText]:
        """The texts that were asked about."""
        return [
            EvaluationText(text.document, text.language, self._tensor(index, "ids").long(), text.prefix)
            for index, text in enumerate(self.capture.texts)
        ]

    def kept(self, index: int) -> Partition:
        """Return what was kept of the original's answer to text ``index``."""
        return Partition(
            tokens=self._tensor(index, "tokens").long(),
            **{name: self._tensor(index, name) for name in ("log_probabilities", "log_tail", "nll")},
        )

    def audited(self, index: int) -> Tensor | None:
        """Return the judged positions of text ``index`` at which whole logits were kept, [n] int64; None if at none."""
        return self._audit_tensor(index, "positions").long() if index in self._audited else None

    def divergence(self, index: int, given: Tensor) -> Divergence:
        """Return how far logits ``given`` [positions, vocabulary] fp32 are from the original's.

        ``kl`` is a lower bound.
        """
        targets, kept = self.texts[index].targets, self.kept(index)
        parts = []
        for each in position_slices(len(targets)):
            part = Partition(*(tensor[each] for tensor in vars(kept).values()))
            parts.append(partition_divergence(part, given[each], targets[each]))
        return Divergence.concatenate(parts)

    def audit(self, answers: Answers) -> CaptureBound:
        """Return how much of the divergence of ``answers`` the partition hides, where whole logits were kept."""
        return self.audit_at(lambda index, chosen: answers(index)[chosen])

    def audit_at(self, logits: Callable[[int, Tensor], Tensor]) -> CaptureBound:
        """Return the same as ``audit`` from logits [n, vocabulary] fp32 of a text at judged positions [n] only."""
        whole, bound = [], []
        for index in self._audited:
            chosen = self._audit_tensor(index, "positions").long()
            given, targets = logits(index, chosen), self.texts[index].targets[chosen]
            kept = Partition(*(tensor[chosen] for tensor in vars(self.kept(index)).values()))
            whole.append(divergence(self._audit_tensor(index, "logits"), given, targets).kl.double())
            bound.append(partition_divergence(kept, given, targets).kl.double())
        return CaptureBound(
            top_k=self.capture.top_k,
            tail_mass=self.capture.tail_mass,
            audit_positions=sum(map(len, whole)),
            kl_mean_nats=float(torch.cat(whole).mean()),
            kl_mean_partition_nats=float(torch.cat(bound).mean()),
        )

    @property
    def _audited(self) -> list[int]:
        """The first text of every language."""
        languages = [text.language for text in self.capture.texts]
        return [languages.index(language) for language in dict.fromkeys(languages)]

    def _tensor(self, index: int, name: str) -> Tensor:
        return _read(self.directory / _answers(self.capture.texts[index].language), f"{index}.{name}")

    def _audit_tensor(self, index: int, name: str) -> Tensor:
        return _read(self.directory / _AUDIT, f"{index}.{name}")

    def _check(self) -> None:
        """Check that every tensor is there in its shape and type, so that no later step can fail on one."""
        vocabulary, k = self.capture.vocabulary_size, min(self.capture.top_k, self.capture.vocabulary_size)
        for answer in self.capture.answers or ():
            ids = (*answer.question.ids, *answer.tokens)
            if not answer.question.ids or not 0 <= min(ids) <= max(ids) < vocabulary:
                raise BundleError(
                    f"{self.directory}: the answer {answer.question.id} has no prompt, or a token outside of 0 to "
                    f"{vocabulary - 1}.",
                    next_step=_AGAIN,
                )
        for index, text in enumerate(self.capture.texts):
            rows = text.positions

            def check(tensor: Tensor, name: str, shape: tuple[int, ...], below: int = 0, index: int = index) -> None:
                dtype = torch.int32 if below else torch.float32
                if tensor.shape != shape or tensor.dtype != dtype:
                    raise BundleError(
                        f"{self.directory}: {name} of text {index} is not {list(shape)} {dtype}.", next_step=_AGAIN
                    )
                if below and not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
                    raise BundleError(
                        f"{self.directory}: {name} of text {index} has a number outside of 0 to {below - 1}.",
                        next_step=_AGAIN,
                    )

            check(self._tensor(index, "ids"), "ids", (text.prefix + rows,), vocabulary)
            check(self._tensor(index, "tokens"), "tokens", (rows, k), vocabulary)
            check(self._tensor(index, "log_probabilities"), "log_probabilities", (rows, k))
            for name in ("log_tail", "nll"):
                check(self._tensor(index, name), name, (rows,))
            if index in self._audited:
                audited = min(_AUDIT_POSITIONS, rows)
                check(self._audit_tensor(index, "positions"), "positions", (audited,), rows)
                check(self._audit_tensor(index, "logits"), "logits", (audited, vocabulary))


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise BundleError(f"{path}: {name} cannot be read: {error}.", next_step=_AGAIN) from error
    return tensor
