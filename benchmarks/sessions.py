"""What ONNX Runtime's session options do to a bundle: load time, memory, and time of a decode step, in turns.

    python -m benchmarks.sessions BUNDLE [--rounds N] [--context N] [--threads N] [--output FILE]

A process a session; caches are bound in place, as onnxruntime-genai does, and filled with noise. "prepacked before"
is a session of the graph that ONNX Runtime writes with its packed weights beside it, which are then mapped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, PRESENT
from glmexport.foundation import machine

#: Attributes of SessionOptions, and configuration entries (with a dot), that differ from the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spins 2 ms": {"session.intra_op.spin_duration_us": "2000"},
    "dynamic block base 4": {"session.dynamic_block_base": "4"},
    "no prepacking": {"session.disable_prepacking": "1"},
    "parallel prepacking": {"session.prepack.enable_parallel": "1"},
    "initializers outside of the arena": {"session.use_device_allocator_for_initializers": "1"},
    "no arena": {"enable_cpu_mem_arena": False},
    "no memory pattern": {"enable_mem_pattern": False},
    "denormals are zero": {"session.set_denormal_as_zero": "1"},
    "prepacked before": {},
}
_PREPACKED = "prepacked before"
_STEPS = 24


class Decoder:
    """A session whose caches, of ``capacity`` positions of noise, are bound in place."""

    def __init__(self, session: onnxruntime.InferenceSession, capacity: int) -> None:
        self._session, self._binding = session, session.io_binding()
        rng = np.random.default_rng(0)
        prefixes = [name.partition(".")[0] for name in (PAST, PRESENT)]
        for value in session.get_inputs():
            if value.name.startswith(prefixes[0]):
                shape = (1, value.shape[1], capacity, value.shape[3])
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape).astype(np.float32))
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(value.name.replace(*prefixes), cache)
        self._binding.bind_output(LOGITS)

    def run(self, ids: NDArray[np.int64], before: int) -> float:
        """Seconds of computing ``ids`` [1, new] behind ``before`` positions."""
        self._binding.bind_cpu_input(INPUT_IDS, ids)
        self._binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, before + ids.shape[1]), np.int64))
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - started


def prepack(graph: Path, folder: Path) -> Path:
    """The graph as ONNX Runtime optimizes it, its packed weights in a file that is mapped."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(folder / "model.onnx")
    for name, value in {
        "session.optimized_model_external_initializers_file_name": "model.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        settings.add_session_config_entry(name, value)
    onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    return folder / "model.onnx"


def child(graph: Path, threads: int, context: int, options: dict[str, Any]) -> dict[str, Any]:
    """One session's figures."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    for name, value in options.items():
        if "." in name:
            settings.add_session_config_entry(name, value)
        else:
            setattr(settings, name, value)
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    load_s, loaded = time.perf_counter() - started, machine.peak_memory()
    decoder = Decoder(session, context + _STEPS + 1)
    steps = [decoder.run(np.full((1, 1), step, np.int64), context + step) for step in range(_STEPS)]
    return {"load_s": load_s, "loaded_bytes": loaded, "peak_bytes": machine.peak_memory(), "steps_s": steps[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.bundle, options.threads, options.context, json.loads(options.child))))
        return
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIONS}
    graph = options.bundle / "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        packed = prepack(graph, Path(folder))
        take(options, {name: packed if name == _PREPACKED else graph for name in OPTIONS}, taken)
        packed_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    write(options, taken, packed_bytes)


def take(options: argparse.Namespace, graphs: dict[str, Path], taken: dict[str, list[dict[str, Any]]]) -> None:
    """Sessions in turns."""
    for turn in range(options.rounds):
        for name in list(OPTIONS)[:: 1 if turn % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.sessions", str(graphs[name])]
            command += ["--context", str(options.context), "--threads", str(options.threads)]
            command += ["--child", json.dumps(OPTIONS[name])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[name].append(json.loads(done.stdout))


def write(options: argparse.Namespace, taken: dict[str, list[dict[str, Any]]], packed_bytes: int) -> None:
    """Table and file."""
    rows = []
    for name, runs in taken.items():
        steps = [seconds for run in runs for seconds in run["steps_s"]]
        rows.append(
            {
                "options": name,
                "load_s": min(run["load_s"] for run in runs),
                "loaded_bytes": min(run["loaded_bytes"] for run in runs),
                "peak_bytes": min(run["peak_bytes"] for run in runs),
                "step_least_s": min(steps),
                "step_median_s": median(steps),
            }
        )
    print("| session options | load s | loaded MiB | peak MiB | decode ms, median | least |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['options']} | {row['load_s']:.2f} | {row['loaded_bytes'] / 2**20:.0f} "
            f"| {row['peak_bytes'] / 2**20:.0f} | {row['step_median_s'] * 1e3:.1f} | {row['step_least_s'] * 1e3:.1f} |"
        )
    if options.output:
        document = {
            "command": "python -m benchmarks.sessions BUNDLE",
            "processor": machine.processor_name(),
            "threads": options.threads,
            "context": options.context,
            "rounds": options.rounds,
            "prepacked_bytes": packed_bytes,
            "versions": machine.library_versions(),
            "rows": rows,
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
