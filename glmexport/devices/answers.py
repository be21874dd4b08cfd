"""The results of a job, checked in every respect before use: a device may be broken, or belong to somebody else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glmexport.devices.job import QUESTIONS, RESULT, DeviceJob, Result, answer_path, read_job, tokens_path
from glmexport.foundation.definition import parse_json
from glmexport.foundation.errors import MachineError
from glmexport.foundation.files import sha256
from glmexport.foundation.untrusted import DocumentLimits, read_regular
from glmexport.validation.divergence import Divergence
from glmexport.validation.partition import Partition, cells_divergence

#: Most bytes of the header of a tensor file, more than any of these takes.
_HEADER = 1 << 12
#: Most bytes of result.json, more than it takes with a node for every operator of a large graph.
RESULT_BYTES = 1 << 26
RESULT_LIMITS = DocumentLimits(size=RESULT_BYTES)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AGAIN = "Run the job again on that device, from nothing."


def read_result(content: bytes, folder: Path, who: str) -> Result:
    """Return the content of result.json, if it answers the job in ``folder`` with the job's files and no others.

    Raises:
        MachineError: it does not answer the job so.
    """
    try:
        result = parse_json(Result, content, RESULT_LIMITS)
    except ValueError as error:
        raise MachineError(f"{who}: {RESULT}: {error}.", next_step=_AGAIN) from error
    job = read_job(folder)
    digest = job.digest(folder)
    if result.job_digest != digest:
        raise MachineError(
            f"{who}: {RESULT} answers another job ({result.job_digest[:12]}..., not {digest[:12]}...).",
            next_step="Run this job on the device, or give the bundle and the original that the answers are for.",
        )
    if not result.complete:
        raise MachineError(f"{who}: {RESULT} says that the run was not finished.", next_step="Let it finish.")
    if (result.speed is None) == (result.speed_absent_because is None):
        raise MachineError(f"{who}: {RESULT} needs either a speed or why there is none.", next_step=_AGAIN)
    limits = _limits(job, folder)
    given = {entry.path: entry for entry in result.files}
    if len(given) != len(result.files) or given.keys() != limits.keys():
        wrong = sorted(given.keys() ^ limits.keys())
        raise MachineError(
            f"{who}: {RESULT} does not list exactly the files of this job; first {wrong[0] if wrong else 'one twice'}.",
            next_step=_AGAIN,
        )
    for path, entry in given.items():
        if not 0 < entry.size <= limits[path] or not _DIGEST.fullmatch(entry.sha256):
            raise MachineError(f"{who}: {RESULT}: the size or digest of {path} cannot be.", next_step=_AGAIN)
    return result


def _limits(job: DeviceJob, folder: Path) -> dict[str, int]:
    """Return every file that answers ``job``, and the most bytes that it can have."""
    limits = {tokens_path(index): _HEADER + 4 * most for index, most in enumerate(job.prompts)}
    with safe_open(folder / QUESTIONS, "pt") as file:
        names = set(file.keys())
        for index in range(len(job.texts)):
            rows, kept = file.get_slice(f"text.{index}.tokens").get_shape()
            audit = f"text.{index}.audit"
            whole = file.get_slice(audit).get_shape()[0] if audit in names else 0
            limits[answer_path(index)] = _HEADER + 4 * (rows * (kept + 3) + whole * job.vocabulary_size)
    return limits


@dataclass(frozen=True)
class DeviceAnswers:
    """The answers of a device to ``questions``."""

    who: str
    job: DeviceJob
    directory: Path
    result: Result
    questions: Mapping[str, Tensor]

    @classmethod
    def open(cls, who: str, folder: Path, directory: Path) -> DeviceAnswers:
        """Read and check every file of ``directory``, which answers the job in ``folder``.

        Raises:
            MachineError: a file is missing, changed, of another shape, or holds what is no number.
        """
        path = directory / RESULT
        if path.is_symlink() or not path.is_file():
            raise MachineError(f"{who}: there is no {RESULT} among the results.", next_step=_AGAIN)
        try:
            content = read_regular(path, RESULT_BYTES)
        except ValueError as error:
            raise MachineError(f"{who}: {RESULT}: {error}.", next_step=_AGAIN) from error
        result = read_result(content, folder, who)
        for entry in result.files:
            file = directory / entry.path
            if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
                raise MachineError(f"{who}: {entry.path} is missing or not a real file.", next_step=_AGAIN)
            if file.stat().st_size != entry.size or sha256(file) != entry.sha256:
                raise MachineError(
                    f"{who}: {entry.path} is not the file that {RESULT} lists (its sha256 differs).", next_step=_AGAIN
                )
            with file.open("rb") as stream:
                # The library would read a header of any claimed length.
                if int.from_bytes(stream.read(8), "little") > _HEADER:
                    raise MachineError(f"{who}: {entry.path} has a header of its own kind.", next_step=_AGAIN)
        with safe_open(folder / QUESTIONS, "pt") as file:
            questions = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        job = read_job(folder)
        answers = cls(who, job, directory, result, questions)
        for index in range(len(job.texts)):
            answers._check(index)
        for index in range(len(job.prompts)):
            answers.tokens(index)
        return answers

    def divergence(self, index: int, original: Partition) -> Divergence:
        """Return ``partition_divergence`` of the answer to text ``index``."""
        kept, others = self._answer(index, "logits"), self._answer(index, "log_others")
        cells = torch.cat([kept, others[:, None]], -1).double()
        whole = cells.logsumexp(-1, keepdim=True)
        return cells_divergence(
            original,
            cells - whole,
            nll=(whole[:, 0] - self._answer(index, "target")).float(),
            top=self._answer(index, "top").long(),
        )

    def audit(self, index: int) -> Tensor:
        """Return whole logits [audited positions, vocabulary] fp32."""
        return self._answer(index, "audit")

    def tokens(self, index: int) -> list[int]:
        """Return the greedy answer to a prompt, as token ids."""
        path, most = tokens_path(index), self.job.prompts[index]
        given = self._read(path, "tokens")
        if given.ndim != 1 or not 1 <= len(given) <= most:
            raise self._refused(path, f"tokens is not 1 to {most} int32")
        self._within(path, "tokens", given)
        tokens: list[int] = given.tolist()
        if any(token in self.job.end_tokens for token in tokens[:-1]):
            raise self._refused(path, "tokens go on behind an end token")
        return tokens

    def _answer(self, index: int, name: str) -> Tensor:
        return self._read(answer_path(index), name)

    def _check(self, index: int) -> None:
        path = answer_path(index)
        rows, kept = self.questions[f"text.{index}.tokens"].shape
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (rows, kept), "log_others": (rows,), "target": (rows,), "top": (rows,),
        }  # fmt: skip
        audited = self.questions.get(f"text.{index}.audit")
        if audited is not None:
            shapes["audit"] = (len(audited), self.job.vocabulary_size)
        try:
            with safe_open(self.directory / path, "pt") as file:
                names = set(file.keys())
        except SafetensorError as error:
            raise self._refused(path, f"cannot be read: {error}") from error
        if names != shapes.keys():
            raise self._refused(path, f"has {', '.join(sorted(names))}, not {', '.join(sorted(shapes))}")
        for name, shape in shapes.items():
            tensor = self._read(path, name)
            if tensor.shape != shape:
                raise self._refused(path, f"{name} is {list(tensor.shape)}, not {list(shape)}")
            if name == "top":
                self._within(path, name, tensor)
                continue
            # Nothing is left for other tokens where all are kept.
            empty = name == "log_others" and kept == self.job.vocabulary_size
            if not bool(((tensor == -torch.inf) if empty else tensor.isfinite()).all()):
                raise self._refused(path, f"{name} has a value that is no number")

    def _within(self, path: str, name: str, tokens: Tensor) -> None:
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.job.vocabulary_size:
            raise self._refused(path, f"{name} has a token outside of 0 to {self.job.vocabulary_size - 1}")

    def _read(self, path: str, name: str) -> Tensor:
        try:
            with safe_open(self.directory / path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise self._refused(path, f"{name} cannot be read: {error}") from error
        expected = torch.int32 if name in ("tokens", "top") else torch.float32
        if tensor.dtype != expected:
            raise self._refused(path, f"{name} is {tensor.dtype}, not {expected}")
        return tensor

    def _refused(self, path: str, what: str) -> MachineError:
        return MachineError(f"{self.who}: {path}: {what}.", next_step=_AGAIN)
