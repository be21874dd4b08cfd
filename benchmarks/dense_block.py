"""One dense block of GLM-4-9B's shape, quantized by glmexport and by GPTQModel in turns, on the same tokens.

    python -m benchmarks.dense_block --work FOLDER [--turns N] [--tokens N] [--format w4g128] [--output FILE]

The checkpoint is one block of noise with a small vocabulary. Each run is a process of its own; what is timed is
quantizing alone, without loading and saving. GPTQModel runs in fp32 and, faster where a processor has units for it, in
bf16; glmexport by torch's default arithmetic, and by what a build chooses on this machine. What is left of the
original is judged as ``benchmarks.quality`` does: of noise that says little about a language model, but it shows
whether one of them has done less. Finished turns are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cost import SHAPES
from benchmarks.peers import AS_BUILT
from benchmarks.quality import Run, finished, judge_of, measure, prepare, uniform
from benchmarks.synthetic import write_synthetic
from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.workflows.original import Original

TOOLS = (("glmexport", AS_BUILT), ("gptqmodel", "bf16"), ("glmexport", "default"), ("gptqmodel", "default"))
_TIMES = {"seconds": "wall", "cpu_seconds": "processor"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="environments, checkpoint and finished turns")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--positions", type=int, default=128, help="evaluated positions a language")
    parser.add_argument("--format", type=uniform, default=uniform("w4g128"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(machine.cores())
    terminal, checkpoint = Terminal(), options.work / "checkpoint"
    if not checkpoint.is_dir():
        shape, _, _ = SHAPES["9b"]
        write_synthetic(checkpoint, {**shape, "num_hidden_layers": 1, "vocab_size": 8192})
    original = Original.open(str(checkpoint), terminal)
    if not (calibration := options.work / "calibration.safetensors").is_file():
        prepare(original, options.tokens, calibration)
    judge, form, rows = None, options.format, []
    for turn in range(options.turns):
        folder = options.work / f"turn_{turn}"
        folder.mkdir(exist_ok=True)
        for name in ("environments", calibration.name):
            if not (folder / name).exists():
                (folder / name).symlink_to((options.work / name).absolute())
        for tool, setting in TOOLS:
            run = Run(tool, setting, form.bits, form.group_size, form.symmetric)
            if (row := finished(run, folder)) is None:
                judge = judge or judge_of(original, options.positions, options.work, terminal)
                row = measure(run, original, judge, folder)
            rows.append({"turn": turn, **{key: value for key, value in row.items() if key != "log"}})
            terminal.remark(f"{tool}, {setting}: {row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of processor")
    found = {
        "command": "python -m benchmarks.dense_block",
        "processor": machine.processor_name(),
        "threads": machine.cores(),
        "calibration_tokens": options.tokens,
        "rows": rows,
    }
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The median of the turns of every tool, and its ratio to GPTQModel's faster one."""
    by_tool = {tool: [row for row in rows if (row["tool"], row["setting"]) == tool] for tool in TOOLS}
    middle = {tool: {key: median(row[key] for row in found) for key in _TIMES} for tool, found in by_tool.items()}
    best = {key: min(each[key] for tool, each in middle.items() if tool[0] == "gptqmodel") for key in _TIMES}
    lines = ["| tool | wall s | processor s | of GPTQModel's | KL, nats | peak GiB |", "|---|---:|---:|---:|---:|---:|"]
    for (tool, setting), times in middle.items():
        last = by_tool[tool, setting][-1]
        ratios = " and ".join(f"{times[key] / best[key]:.2f}" for key in _TIMES)
        lines.append(
            f"| {tool}, {setting} | {times['seconds']:.0f} | {times['cpu_seconds']:.0f} | {ratios} | "
            f"{last['kl_mean_nats']:.5f} | {last['peak_rss_bytes'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
