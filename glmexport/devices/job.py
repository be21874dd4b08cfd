"""A job: everything that a device is asked about one bundle, in a folder, and the form of what it answers.

    job/job.json               what is asked of which files
    job/questions.safetensors  token ids, and what is to be kept of the answers
    job/bundle/                the bundle's files

    results/result.json               the device, its speed, and the digest of every other file
    results/answers/0.safetensors …   of each text
    results/tokens/0.safetensors …    of each prompt

The digest of ``job.json`` stands for all of the job: it lists every file with its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import FixedLoopConfig, LoopConfig
from glmexport.bundle.manifest import FileEntry, Manifest
from glmexport.bundle.names import (
    ASKED,
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    MODEL,
    PAST,
    POSITION_IDS,
    PRESENT,
    SCORING,
    STEP,
    WEIGHTS,
)
from glmexport.engine.core.cache import CAPACITY
from glmexport.engine.placement import Node
from glmexport.engine.scoring import require_room
from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import InputError
from glmexport.foundation.files import sha256, write_atomically
from glmexport.foundation.target import Provider
from glmexport.results.device import DeviceFacts

JOB, QUESTIONS, BUNDLE, RESULT = "job.json", "questions.safetensors", "bundle", "result.json"
CacheType = Literal["float32", "float16", "bfloat16", "int8", "uint8"]
_CACHE_TYPES: dict[ir.DataType, CacheType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
}


class Cache(Definition):
    """An input of a graph and the output that follows it."""

    input: str
    output: str
    #: With the names of sizes that ``CacheSpec`` has.
    shape: tuple[int | str, ...]
    dtype: CacheType


class FixedShapes(Definition):
    """What more there is where every shape is fixed, and the batch 1."""

    #: New positions of the graphs above; those behind the last token are filled up, and do not count.
    chunk: int
    #: The graph for one token.
    step: str
    #: Positions [1, sequence] int64, and in the graph for generation the index [1] int64 whose logits it gives.
    position_ids: str
    asked_position: str


class Graphs(Definition):
    """The bundle's graphs, which differ in the positions whose logits they give, and where shapes are fixed in more."""

    #: Logits [batch, sequence, vocabulary] of every position.
    scoring: str
    #: Logits [batch, 1, vocabulary] of the last one.
    generation: str
    #: Token ids [batch, sequence] int64; unless shapes are fixed, a mask of ones [batch, past and new tokens] int64.
    input_ids: str
    attention_mask: str | None
    logits: str
    caches: tuple[Cache, ...]
    #: growing: the output is the input with the new positions behind it, from none. capacity: one buffer is both, and
    #: new positions are written into it.
    cache_kind: Literal["growing", "capacity"]
    fixed: FixedShapes | None = None


class SpeedRequest(Definition):
    """How speed is measured: the prompt is read and ``generated_tokens`` follow, end tokens or not."""

    prompt: tuple[int, ...] = Field(min_length=1)
    generated_tokens: int = Field(ge=2)
    #: At least so many, after one that does not count; and until ``seconds`` have passed.
    rounds: int = Field(ge=1)
    seconds: float = Field(ge=0)


class Job(Definition):
    """The content of job.json."""

    format: Literal["glmexport-job"] = "glmexport-job"
    version: Literal[1] = 1
    bundle_digest: str
    #: Paths relative to the job's folder.
    files: tuple[FileEntry, ...]
    graphs: Graphs
    provider: Provider
    #: Configuration entries of a session.
    config: dict[str, str] = Field(default_factory=dict)
    #: None: as many as the device has cores.
    threads: int | None
    end_tokens: tuple[int, ...]
    context_length: int
    vocabulary_size: int
    #: Of each text, the tokens that are given. Position i is the prediction of token prefix + i.
    texts: tuple[int, ...] = Field(min_length=1)
    #: Of each prompt, the tokens at which its answer is cut.
    prompts: tuple[int, ...]
    speed: SpeedRequest | None

    def digest(self, directory: Path) -> str:
        """SHA-256 of job.json as it is in ``directory``."""
        return sha256(directory / JOB)


@dataclass(frozen=True)
class TextQuestion:
    """One text. ``ids`` [length], ``tokens`` [positions, k] and ``targets`` [positions] int64; ``audit`` positions
    whose whole logits are wanted.
    """

    ids: Tensor
    prefix: int
    tokens: Tensor
    audit: Tensor | None


@dataclass(frozen=True)
class PromptQuestion:
    """A prompt, and where its answer is cut."""

    ids: Sequence[int]
    max_tokens: int


def write_job(
    directory: Path,
    bundle: Bundle,
    texts: Sequence[TextQuestion],
    prompts: Sequence[PromptQuestion],
    *,
    vocabulary_size: int,
    speed: SpeedRequest | None,
    threads: int | None,
) -> Job:
    """Write the job into the new ``directory``; the same arguments give the same bytes.

    Raises:
        InputError: caches of a fixed capacity do not hold a text.
        BundleError: the bundle's loop cannot be read.
    """
    graphs, needed = _graphs(bundle), needed_files(bundle.manifest)
    if graphs.fixed:
        require_room(max(len(text.ids) for text in texts), bundle.context_length)
    directory.mkdir(parents=True)
    _link(bundle, directory / BUNDLE)
    tensors: dict[str, Tensor] = {}
    for index, text in enumerate(texts):
        tensors[f"text.{index}.ids"] = text.ids.int()
        tensors[f"text.{index}.tokens"] = text.tokens.int().contiguous()
        tensors[f"text.{index}.targets"] = text.ids[text.prefix :].int()
        if text.audit is not None:
            tensors[f"text.{index}.audit"] = text.audit.int()
    for index, prompt in enumerate(prompts):
        tensors[f"prompt.{index}.ids"] = torch.tensor(list(prompt.ids), dtype=torch.int32)
    save_file(tensors, directory / QUESTIONS)
    questions = directory / QUESTIONS
    job = Job(
        bundle_digest=bundle.digest,
        files=(
            FileEntry(path=QUESTIONS, size=questions.stat().st_size, sha256=sha256(questions)),
            *(entry.model_copy(update={"path": f"{BUNDLE}/{entry.path}"}) for entry in needed),
        ),
        graphs=graphs,
        provider=bundle.target.provider,
        config=bundle.target.session.config,
        threads=threads,
        end_tokens=tuple(sorted(bundle.ends)),
        context_length=bundle.context_length,
        vocabulary_size=vocabulary_size,
        texts=tuple(text.prefix for text in texts),
        prompts=tuple(prompt.max_tokens for prompt in prompts),
        speed=speed,
    )
    write_atomically(directory / JOB, (job.model_dump_json(indent=1) + "\n").encode())
    return job


def needed_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    """Return the files of a bundle that a device reads: the graphs and their weights."""
    graphs = (MODEL, STEP, SCORING)
    return tuple(
        entry for entry in manifest.files if entry.path in graphs or entry.path.startswith(f"{WEIGHTS}/")
    )


def read_job(directory: Path) -> Job:
    """Read the job in ``directory``.

    Raises:
        InputError: there is none that can be read.
    """
    try:
        return read_json(Job, directory / JOB)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / JOB} is no job: {error}.", next_step="Write the job again.") from error


def _link(bundle: Bundle, place: Path) -> None:
    """Put the bundle at ``place``: one link to where its files are real, or copies where there are no links."""
    try:
        place.symlink_to(bundle.loadable, target_is_directory=True)
    except OSError:
        for entry in needed_files(bundle.manifest):
            (place / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(entry.path), place / entry.path)


def _graphs(bundle: Bundle) -> Graphs:
    # The weights stay where they are: only the graph itself is read.
    inputs = ir.load(bundle.model).graph.inputs
    caches = []
    for value in inputs:
        if value.name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, ASKED):
            continue
        assert value.name is not None and value.shape is not None and value.dtype is not None
        layer, kind = value.name.split(".")[1:]
        caches.append(
            Cache(
                input=PAST.format(layer=layer, kind=kind),
                output=PRESENT.format(layer=layer, kind=kind),
                shape=tuple(size if isinstance(size, int) else str(size.value) for size in value.shape),
                dtype=_CACHE_TYPES[value.dtype],
            )
        )
    sizes = {size for cache in caches for size in cache.shape}
    fixed = _fixed_shapes(bundle.loop)
    return Graphs(
        scoring=f"{BUNDLE}/{SCORING}",
        generation=f"{BUNDLE}/{MODEL}",
        input_ids=INPUT_IDS,
        attention_mask=None if fixed else ATTENTION_MASK,
        logits=LOGITS,
        caches=tuple(caches),
        cache_kind="capacity" if fixed or CAPACITY in sizes else "growing",
        fixed=fixed,
    )


def _fixed_shapes(loop: LoopConfig | FixedLoopConfig | GenaiConfig) -> FixedShapes | None:
    if not isinstance(loop, FixedLoopConfig):
        return None
    return FixedShapes(
        chunk=loop.chunk,
        step=f"{BUNDLE}/{loop.step_graph}",
        position_ids=loop.position_ids,
        asked_position=loop.asked_position,
    )


class Round(Definition):
    """One generation: seconds to the first token, and of each further one."""

    ttft_s: float = Field(gt=0)
    steps_s: tuple[float, ...] = Field(min_length=1)


class SpeedResult(Definition):
    """What was timed in a process that did nothing before but check files."""

    threads: int | None = Field(ge=1)
    load_s: float = Field(ge=0)
    rounds: tuple[Round, ...] = Field(min_length=1)
    peak_memory_bytes: int | None = Field(ge=0)
    #: What told it, or why nothing did.
    peak_memory_source: str
    #: At which memory is read; None where it cannot be measured.
    memory_bandwidth_bytes_per_s: float | None = Field(gt=0)


class Result(Definition):
    """The content of result.json."""

    format: Literal["glmexport-result"] = "glmexport-result"
    version: Literal[1] = 1
    #: SHA-256 of job.json.
    job_digest: str
    device: DeviceFacts
    speed: SpeedResult | None
    #: Why speed is None; None if it is there.
    speed_absent_because: str | None
    #: Which provider ran which node of the generation graph; None: this runtime does not tell.
    nodes: tuple[Node, ...] | None
    files: tuple[FileEntry, ...]
    complete: bool


def answer_path(index: int) -> str:
    """What a device answers to a text."""
    return f"answers/{index}.safetensors"


def tokens_path(index: int) -> str:
    """What a device answers to a prompt."""
    return f"tokens/{index}.safetensors"
