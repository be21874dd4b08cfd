"""Where the time of a bundle goes: a decode step and a piece of a prompt by operator, from ONNX Runtime's profile.

    python -m benchmarks.operators BUNDLE [--context N] [--piece N] [--threads N] [--output FILE]

Of each node the least of several runs counts, so that what else the machine does falls on none. Caches are bound in
place, as onnxruntime-genai does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.sessions import Decoder
from glmexport.bundle.genai_config import PREFILL_TOKENS
from glmexport.foundation import machine

_TIMES = {"decode": 24, "prefill": 4}


def profiled(bundle: Path, threads: int, before: int, tokens: int, times: int) -> dict[str, Any]:
    """Microseconds by operator of computing ``tokens`` behind ``before`` positions, and of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
        decoder = Decoder(session, before + tokens)
        ids = np.random.default_rng(1).integers(0, 1000, (1, tokens))
        runs = [decoder.run(ids, before) for _ in range(times)]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    least: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            least[node] = min(event["dur"], least.get(node, event["dur"]))
    sums: dict[str, list[float]] = defaultdict(list)
    for (operator, _), duration in least.items():
        sums[operator].append(duration)
    rows = [
        {"operator": operator, "nodes": len(durations), "microseconds": sum(durations)}
        for operator, durations in sorted(sums.items(), key=lambda item: -sum(item[1]))
    ]
    return {"tokens": tokens, "before": before, "run_microseconds": min(runs) * 1e6, "operators": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=128, help="positions before a decode step")
    parser.add_argument("--piece", type=int, default=PREFILL_TOKENS, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    shapes = {"decode": (options.context, 1), "prefill": (0, options.piece)}
    found = {name: profiled(options.bundle, options.threads, *shape, _TIMES[name]) for name, shape in shapes.items()}
    for name, profile in found.items():
        whole = sum(row["microseconds"] for row in profile["operators"])
        taken = profile["run_microseconds"] / 1e3
        print(f"{name}: {profile['tokens']} tokens behind {profile['before']}, {taken:.1f} ms")
        print("| operator | nodes | ms | share |\n|---|---:|---:|---:|")
        for row in profile["operators"]:
            share = row["microseconds"] / whole
            print(f"| {row['operator']} | {row['nodes']} | {row['microseconds'] / 1e3:.2f} | {share:.1%} |")
    if options.output:
        document = {
            "command": "python -m benchmarks.operators BUNDLE",
            "processor": machine.processor_name(),
            "threads": options.threads,
            "versions": machine.library_versions(),
            **found,
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
