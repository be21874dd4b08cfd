"""How long quantizers take, in turns: what else the machine does then falls on all alike.

    python -m benchmarks.turns --work FOLDER --tool glmexport --tool gptqmodel [--turns 2] [--output FILE]

Each takes its turn at the same format of the same checkpoint, on the calibration text and in the environments of
``benchmarks.quality`` (see there). Seconds are those of quantizing, without loading and saving.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.peers import PEERS, run_peer
from benchmarks.quality import prepare, uniform
from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.workflows.original import Original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="environments and calibration text")
    parser.add_argument("--tool", action="append", dest="tools", required=True, metavar="NAME[:SETTING]")
    parser.add_argument("--format", type=uniform, default=uniform("w4g128"))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=49152, help="of calibration text")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    original = Original.open(options.checkpoint, Terminal())
    options.work.mkdir(parents=True, exist_ok=True)
    calibration = options.work / "calibration.safetensors"
    if not calibration.is_file():
        prepare(original, options.tokens, calibration)
    form, rows = options.format, []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for named in options.tools:
                tool, _, setting = named.partition(":")
                facts = run_peer(
                    options.work / "environments",
                    tool,
                    setting or PEERS[tool].settings[0],
                    original.checkpoint.path,
                    calibration,
                    Path(folder) / "weights.safetensors",
                    form.bits,
                    form.group_size,
                    form.symmetric,
                )
                kept = ("setting", "seconds", "cpu_seconds", "threads", "versions")
                rows.append({"tool": tool, "turn": turn, **{key: facts[key] for key in kept}})
                print(f"{tool}, {facts['setting']}: {facts['seconds']:.1f} s, {facts['cpu_seconds']:.1f} processor s")
    for tool in dict.fromkeys(row["tool"] for row in rows):
        wall, busy = (median(row[key] for row in rows if row["tool"] == tool) for key in ("seconds", "cpu_seconds"))
        print(f"{tool}: median of {options.turns}: {wall:.1f} s, {busy:.1f} processor s")
    if options.output:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "checkpoint": original.checkpoint.name,
            "format": form.label,
            "processor": machine.processor_name(),
            "cores": machine.cores(),
            "rows": rows,
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
