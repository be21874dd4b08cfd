"""The cost of a unit of each kind of work on this machine: measured in seconds, and kept for the next command.

Each kind is measured by the very functions that a build spends its time in, on small inputs, several times in turns:
a disturbed moment shows as a spread, which is told and never kept.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import psutil
import torch
from pydantic import Field

from glmexport.calibration.hessian import Hessian, hessian_operations
from glmexport.checkpoint.checkpoint import CONFIG, Checkpoint
from glmexport.formats.codecs import codec_of
from glmexport.formats.nearest import round_to_nearest
from glmexport.foundation import machine
from glmexport.foundation.cache import CacheFile
from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import MachineError
from glmexport.foundation.recipe import Format, Solver
from glmexport.foundation.work import MEASURED_KINDS, Range
from glmexport.quantization.cholesky import cholesky, cholesky_operations, cholesky_solve, solving_operations
from glmexport.quantization.polish import polish
from glmexport.quantization.problem import Problem
from glmexport.quantization.solve import Sweep, round_columns, start_sweep
from glmexport.reference.arithmetic import computing
from glmexport.reference.coarse import coarse_product
from glmexport.reference.reference import CPU
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.validation.divergence import divergence

#: Fewest tries of each trial, and seconds for which more are made while they differ.
_TRIES, _SECONDS = 5, 3.0
#: Ratio of the usual try to the fastest one, in the middle of all trials, above which the machine is busy.
_SPREAD = 1.25
#: Share of the cores that other processes may take before the machine is busy: on average in the last minute, and while
#: costs are measured.
_LOAD, _LOAD_MEANWHILE = 0.3, 0.1
#: Most machines, threads and libraries whose costs are kept.
_MOST = 64
_FORM = Format(bits=4, group_size=32)
_MIB = 1 << 20


class _Kept(Definition):
    """The costs of the units on one machine, seconds: in the fastest try, and in the one in the middle."""

    machine: str = Field(min_length=1)
    low: dict[str, float]
    high: dict[str, float]


class _KeptCosts(Definition):
    costs: tuple[_Kept, ...] = ()


_COSTS = CacheFile("costs-2.json", _KeptCosts())


@dataclass(frozen=True)
class UnitCosts:
    """Seconds that a unit of each kind of work costs, and whether the machine was, or is, busy with something else."""

    seconds: dict[str, Range]
    busy: bool


def unit_costs(
    arithmetic: OriginalArithmetic = UNCHECKED, device: torch.device = CPU, *, anew: bool = False
) -> UnitCosts:
    """Return the costs on this machine, with torch's present threads: those that are kept, or else measured now.

    Args:
        arithmetic: the route of large products; each has costs of its own.
        device: where matrices are quantized.
        anew: measure, whatever is kept.
    """
    name = _machine(device, arithmetic.label)
    kept = next((each for each in _COSTS.read().costs if each.machine == name), None)
    if kept is not None and not anew and {*kept.low, *kept.high} == {*MEASURED_KINDS}:
        return UnitCosts({kind: Range(kept.low[kind], kept.high[kind]) for kind in MEASURED_KINDS}, _is_loaded())
    if anew or name not in _MEASURED:
        with computing(arithmetic):
            _MEASURED[name] = _measured(name, device, arithmetic)
    return _MEASURED[name]


#: The costs that this process has measured already: on a busy machine nothing is kept, and it stays as busy.
_MEASURED: dict[str, UnitCosts] = {}


def _measured(name: str, device: torch.device, arithmetic: OriginalArithmetic) -> UnitCosts:
    """Measure the costs on ``device``, and keep them for this machine's ``name`` if nothing disturbed them."""
    loaded, meanwhile = _is_loaded(), _Others()
    tries = _measure(device, arithmetic)
    # The fastest try is what the machine can do, and the one in the middle what it does.
    quick, usual = (_units({name: of(taken) for name, taken in tries.items()}) for of in (min, statistics.median))
    seconds = {kind: Range(quick[kind], max(quick[kind], usual[kind])) for kind in MEASURED_KINDS}
    busy = loaded or meanwhile.share() > _LOAD_MEANWHILE or _spread(tries) > _SPREAD
    if not busy:
        _keep(name, seconds)
    return UnitCosts(seconds, busy)


def _machine(device: torch.device, arithmetic: str) -> str:
    """Return a text of everything that costs depend on."""
    on = machine.processor_name() if device == CPU else torch.cuda.get_device_name(device)
    threads, versions = torch.get_num_threads(), f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    return f"{on}, {machine.processor_name()}, {threads} threads of {machine.cores()}, {versions}, {arithmetic}"


def _is_loaded() -> bool:
    """Return whether other processes have taken a good part of the cores during the last minute."""
    return bool(psutil.getloadavg()[0] > _LOAD * (os.cpu_count() or 1) + 0.5)


class _Others:
    """The time of the processor that other processes, or other guests of the same host, take from now on."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = self._taken(), time.process_time(), time.monotonic()

    def share(self) -> float:
        """Return the share of all cores that they took so far."""
        others = (self._taken() - self._busy) - (time.process_time() - self._own)
        return others / ((time.monotonic() - self._started) * (os.cpu_count() or 1))

    @staticmethod
    def _taken() -> float:
        times = psutil.cpu_times()
        # Where a host tells what it gave to others, that is missing here too.
        return float(times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0))


def _keep(name: str, seconds: dict[str, Range]) -> None:
    new = _Kept(
        machine=name,
        low={kind: cost.low for kind, cost in seconds.items()},
        high={kind: cost.high for kind, cost in seconds.items()},
    )

    def with_new(content: _KeptCosts) -> _KeptCosts:
        others = [each for each in content.costs if each.machine != name]
        return _KeptCosts(costs=(*others, new)[-_MOST:])

    try:
        _COSTS.change(with_new)
    except MachineError:
        # They are measured again by the next command, which takes seconds.
        return


def _measure(device: torch.device, arithmetic: OriginalArithmetic) -> dict[str, list[float]]:
    """Return the seconds of every trial in each try."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        trials = {**_products(device, arithmetic), **_steps(device), **_files(Path(folder)), **_bundle()}
        for run, _ in trials.values():
            run()
        started, rounds = time.monotonic(), 0
        while rounds < _TRIES or (_spread(found) > _SPREAD and time.monotonic() < started + _SECONDS):
            rounds += 1
            for name, (run, on) in trials.items():
                found.setdefault(name, []).append(_seconds(run, on))
    return found


def _spread(tries: dict[str, list[float]]) -> float:
    """Return how many times as long as its fastest try the usual try of a trial takes, in the middle of all trials."""
    return statistics.median(statistics.median(taken) / min(taken) for taken in tries.values())


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device != CPU:
        # A device computes asynchronously.
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


#: A piece of work that is timed, and the device that does it.
_Trial = tuple[Callable[[], object], torch.device]
#: Sizes of the trials: rows and columns of products, tokens and heads of attention, rows of logits and vocabulary.
_ROWS, _SIZE, _LENGTH, _HEADS, _HEAD_SIZE, _POSITIONS, _VOCABULARY = 512, 4096, 512, 8, 128, 64, 16384
#: Size of what is factored, and of matrices in the bundle.
_FACTORED, _NARROW = 2048, 1024
#: Columns that are swept at a time, with few rows and with many; groups that are searched.
_SWEPT, _FEW, _MANY, _GROUPS = 2 * _FORM.group_size, 64, 4096, 8
#: Numbers that are read; bytes that are hashed and written; rows of the bundle's matrices, and tokens at a time.
_VALUES, _BYTES, _SMALL, _LARGE, _TOKENS = 8 * _MIB, 16 * _MIB, 4096, 98304, 256


def _units(seconds: dict[str, float]) -> dict[str, float]:
    """Return what a unit of each kind costs where the trials took so many ``seconds``."""
    weights = _SWEPT * (_MANY - _FEW)
    steps: dict[str, float] = {}
    for kind in ("swept", "polished"):
        few, many = seconds[f"{kind}, few rows"], seconds[f"{kind}, many rows"]
        # What is left of a difference of times can be less than nothing.
        steps |= {f"{kind}_columns": few / _SWEPT, f"{kind}_weights": max(many - few, 1e-3 * many) / weights}
    return steps | {
        "products": seconds["products"] / (2 * _ROWS * _SIZE**2),
        "coarse_products": seconds["coarse_products"] / (2 * _ROWS * _SIZE**2),
        "moments": seconds["moments"] / hessian_operations(_ROWS, _SIZE),
        "coarse_moments": seconds["coarse_moments"] / hessian_operations(_ROWS, _SIZE),
        "triangular": seconds["triangular"]
        / (cholesky_operations(_FACTORED) + solving_operations(_FACTORED, _FACTORED // 2)),
        "attention": seconds["attention"] / (4 * _LENGTH**2 * _HEADS * _HEAD_SIZE),
        "compared_logits": seconds["compared_logits"] / (_POSITIONS * _VOCABULARY),
        "searched_weights": seconds["searched_weights"] / (_GROUPS * _FORM.group_size * _MANY),
        "rounded_weights": seconds["rounded_weights"] / _NARROW**2,
        "read_values": seconds["read_values"] / _VALUES,
        "hashed_bytes": seconds["hashed_bytes"] / _BYTES,
        "written_bytes": seconds["written_bytes"] / _BYTES,
        "bundle_products": seconds["bundle_products"] / (2 * _TOKENS * _NARROW * _SMALL),
        "bundle_bytes": seconds["bundle_bytes"] / (codec_of(_FORM).stored_bits((_LARGE, _NARROW)) / 8),
    }


def _products(device: torch.device, arithmetic: OriginalArithmetic) -> dict[str, _Trial]:
    """Return trials of large products, of each kind of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _SIZE, generator=generator).to(device)
    square = torch.randn(_SIZE, _SIZE, generator=generator).to(device)
    rounded = square.bfloat16()
    right = torch.randn(_FACTORED, _FACTORED, generator=generator).to(device)
    positive = right @ right.T / _FACTORED + torch.eye(_FACTORED, device=device)
    query = torch.randn(1, _HEADS, _LENGTH, _HEAD_SIZE, generator=generator).to(device)
    hessian = Hessian(_SIZE, device)
    rounded_hessian = Hessian(_SIZE, device, coarse=arithmetic.coarse_moments)
    logits = torch.randn(_POSITIONS, _VOCABULARY, generator=generator)
    targets = torch.zeros(_POSITIONS, dtype=torch.int64)

    def solved() -> torch.Tensor:
        lower = cholesky(positive)
        assert lower is not None
        return cholesky_solve(right[:, : _FACTORED // 2], lower)

    def attended() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    return {
        "products": (lambda: rows @ square, device),
        "coarse_products": (lambda: coarse_product(rows, rounded) if arithmetic.coarse else rows @ square, device),
        "moments": (lambda: hessian.add(rows), device),
        "coarse_moments": (lambda: rounded_hessian.add(rows), device),
        "triangular": (solved, device),
        "attention": (attended, device),
        "compared_logits": (lambda: divergence(logits, logits, targets), CPU),
    }


def _steps(device: torch.device) -> dict[str, _Trial]:
    """Return trials of what the solver does column by column, and of rounding."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * _SWEPT, _SWEPT, generator=generator)
    plain = Solver(scale_search=False)
    problem = Problem.prepare((inputs.T @ inputs / len(inputs)).to(device), _FORM, plain)
    factor, codec = problem.factor, codec_of(_FORM)
    assert factor is not None
    matrices = [torch.randn(rows, _SWEPT, generator=generator).to(device) for rows in (_FEW, _MANY)]
    few, many = (start_sweep(matrix, problem.order) for matrix in matrices)
    columns = matrices[1].T[: _FORM.group_size].contiguous()
    importance = torch.ones(_FORM.group_size, device=device)
    whole = torch.randn(_NARROW, _NARROW, generator=generator).to(device)

    def swept(sweep: Sweep) -> None:
        round_columns(sweep, factor, problem.order, codec, plain)

    def polished(sweep: Sweep) -> None:
        polish(sweep, factor, problem.order, codec, rounds=1)

    def searched() -> None:
        for _ in range(_GROUPS):
            codec.fit(columns, importance)

    return {
        "swept, few rows": (lambda: swept(few), device),
        "swept, many rows": (lambda: swept(many), device),
        "polished, few rows": (lambda: polished(few), device),
        "polished, many rows": (lambda: polished(many), device),
        "searched_weights": (searched, device),
        "rounded_weights": (lambda: round_to_nearest(whole, _FORM).dequantize(), device),
    }


def _files(folder: Path) -> dict[str, _Trial]:
    """Return trials of reading a checkpoint that the system has in memory, hashing, and writing."""
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(8192, _VALUES // 8192).bfloat16()}, folder / "model.safetensors")
    (folder / CONFIG).write_text('{"model_type": "glm4"}', encoding="utf-8")
    checkpoint, content = Checkpoint.open(folder), bytes(_BYTES)

    def write() -> None:
        with (folder / "written").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return {
        "read_values": (lambda: checkpoint.read("weight"), CPU),
        "hashed_bytes": (lambda: hashlib.sha256(content).digest(), CPU),
        "written_bytes": (write, CPU),
    }


def _bundle() -> dict[str, _Trial]:
    """Return trials of the runtime's product with 4-bit weights: many tokens at a time, and one."""
    many, one = _product_session(_SMALL), _product_session(_LARGE)
    tokens, token = ({"x": torch.randn(count, _NARROW).numpy()} for count in (_TOKENS, 1))
    return {
        "bundle_products": (lambda: many.run(None, tokens), CPU),
        "bundle_bytes": (lambda: one.run(None, token), CPU),
    }


def _product_session(rows: int) -> onnxruntime.InferenceSession:
    """Return a session that multiplies x [n, K] by a 4-bit matrix of so many ``rows``."""
    from onnx import TensorProto, helper, numpy_helper

    groups, half = _NARROW // _FORM.group_size, _FORM.group_size // 2
    tensors = {
        "q": torch.randint(0, 256, (rows, groups, half), dtype=torch.uint8),
        "scales": torch.rand(rows, groups) * 0.01,
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=_NARROW,
        N=rows,
        bits=4,
        block_size=_FORM.group_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", _NARROW])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
