"""One small bundle, built once a test run, and ways to build more and to call the command line in process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime
import pytest
from models import write_checkpoint

import glmexport.workflows.build
import glmexport.workflows.validate
from glmexport.assembly.read import BundleWeights
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import EVIDENCE
from glmexport.bundle.names import LOGITS
from glmexport.cli import main
from glmexport.engine.placement import Node
from glmexport.foundation.definition import shipped_folder
from glmexport.foundation.host import CPU_PROVIDER
from glmexport.foundation.progress import Progress, Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.reference.arithmetic_choice import choose_arithmetic
from glmexport.validation.conditions import ValidationPlan
from glmexport.validation.runtimes import Memory, Round, RuntimeRequest
from glmexport.validation.speed import MeasurementTurns
from glmexport.workflows.job import Job
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, Built

TARGET = "x86-avx2"
THREADS = 1
#: Enough to pass through every line of the validation, and too little for a verdict.
QUICK = ValidationPlan(
    positions_per_language=24, longest_text=32, prompt_tokens=8, generated_tokens=4, speed_seconds=0, behaviour=None
)
DEFAULT = ValidationPlan().positions_per_language


def no_turns(requests: Sequence[RuntimeRequest], seconds: float, progress: Progress) -> list[MeasurementTurns]:
    """In place of measurements that take two processes."""
    rounds = (Round(ttft_s=1, steps_s=(1, 1, 1), decode_j=None),) * 2
    memory = Memory(bytes=1, source="none", energy_absent_because="Nothing was measured.")
    node = Node(name="none", operator="none", provider="CPUExecutionProvider", small=False)
    return [MeasurementTurns("none", THREADS, 1, rounds, memory, () if index else (node,)) for index in
    range(len(requests))]


TURNS = "glmexport.validation.performance.take_turns"
FORMATS = """
[linears]
bits = 4
group_size = 32

[lm_head]
bits = 8
group_size = 32

[embedding]
bits = 8
group_size = 32
"""
RECIPE = f"""summary = "Small"
{FORMATS}
[solver]
polish_rounds = 1

[calibration]
tokens = 2048
sequence_length = 64

[calibration.quota]
zh = 1
en = 1
"""


def write_recipe(directory: Path, text: str = RECIPE, name: str = "small") -> Path:
    """A recipe file."""
    path = directory / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def write_target(directory: Path, changes: dict[str, str], name: str) -> Path:
    """The AVX2 target with some lines exchanged, as a file."""
    text = (shipped_folder("targets") / f"{TARGET}.toml").read_text(encoding="utf-8")
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    path = directory / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def write_fixed_target(directory: Path, chunk: int, context: int) -> Path:
    """The shipped one of fixed shapes, for the CPU provider and in fp32."""
    text = (shipped_folder("targets") / "qnn.toml").read_text(encoding="utf-8")
    for before, after in {
        '"QNNExecutionProvider"': f'"{CPU_PROVIDER}"',
        '"onnxruntime-qnn"': '"onnxruntime"',
        'activations = "float16"': 'activations = "float32"',
        "chunk = 64": f"chunk = {chunk}",
        # The last chunk would not be whole.
        "capacity = 4096": f"capacity = {context + 5}",
        'machine = ["arm64", "aarch64"]': "",
        # Where ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul, in the arithmetic of the graph.
        "[gates]": '[session.config]\n"session.qdq_matmulnbits_accuracy_level" = "0"\n\n[gates]',
    }.items():
        assert before in text
        text = text.replace(before, after, 1)
    path = directory / "fixed.toml"
    path.write_text(text, encoding="utf-8")
    return path


def small_checkpoint(directory: Path, model_type: str = "glm4", **changes: Any) -> Any:
    """Two layers with random weights; returns the transformers model in fp32."""
    return write_checkpoint(directory, model_type, num_hidden_layers=2, **changes)


def build(
    checkpoint: Path,
    output: Path,
    recipe: Path | str,
    targets: tuple[str, ...] = (TARGET,),
    progress: Progress | None = None,
    measure: bool = False,
    **options: Any,
) -> list[Built]:
    """Build with a quick validation; with several targets, each into a directory of its name below ``output``.

    Only bundles that this machine can run.

    Speed is measured only if ``measure`` asks for it. The arithmetic is the command line's, if none is given.
    """
    progress = progress or Silent()
    options.setdefault("arithmetic", choose_arithmetic("auto", THREADS, Silent()))
    original = Original.open(str(checkpoint), progress)
    jobs = [
        Job(open_target(name), open_recipe(str(recipe)), output if len(targets) == 1 else output / Path(name).stem)
        for name in targets
    ]
    settings = BuildOptions(THREADS, validation=QUICK, **options)
    with nullcontext() if measure else patch(TURNS, no_turns):
        built = glmexport.workflows.build.build(original, jobs, settings, progress)
    assert all(isinstance(bundle, Built) for bundle in built)
    return built


@dataclass(frozen=True)
class Sample:
    """A checkpoint, the recipe, and the bundle that they make. Copy what a test changes."""

    checkpoint: Path
    recipe: Path
    bundle: Path
    built: Built
    model: Any


@cache
def build_sample(base: Path) -> Sample:
    """Built on first use; every folder of tests gets the same one."""
    directory = base / "sample"
    model = small_checkpoint(directory / "checkpoint")
    recipe = write_recipe(directory)
    (built,) = build(directory / "checkpoint", directory / "bundle", recipe, measure=True)
    return Sample(directory / "checkpoint", recipe, built.directory, built, model)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The small glm4 bundle."""
    return build_sample(tmp_path_factory.getbasetemp())


def digests(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file but the report's."""
    return {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name not in EVIDENCE
    }


def session(bundle: Path, name: str) -> onnxruntime.InferenceSession:
    """One of the bundle's graphs, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(bundle / name, options, providers=["CPUExecutionProvider"])


def carried(graph: onnxruntime.InferenceSession) -> list[str]:
    """Names of the logits and, in the order of its caches, of what a graph hands on to the next step."""
    return [value.name for value in graph.get_outputs() if value.name == LOGITS or value.name.startswith("present")]


def bundle_weights(bundle: Path, checkpoint: Path) -> BundleWeights:
    """What the bundle's graph holds."""
    return BundleWeights.open(Bundle.open(bundle), Original.open(str(checkpoint), Silent()).architecture)


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; NaN and Infinity are no JSON."""
        return json.loads(self.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, with a quick validation that measures no speed."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["glmexport", *map(str, arguments)])
        capsys.readouterr()
        code = main.run_command()
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def options(*values: Any, validation: ValidationPlan | None = None, **named: Any) -> BuildOptions:
        positions = validation.positions_per_language if validation else DEFAULT
        plan = QUICK if positions == DEFAULT else replace(QUICK, positions_per_language=positions)
        plan = replace(plan, full_text=bool(validation and validation.full_text))
        if validation and validation.behaviour and plan.behaviour:
            plan = replace(plan, behaviour=replace(plan.behaviour, most=validation.behaviour.most))
        return BuildOptions(*values, validation=plan, **named)

    monkeypatch.setattr(glmexport.workflows.validate, "BuildOptions", options)
    monkeypatch.setattr(TURNS, no_turns)
    return call
