"""Speed of one checkpoint of real width in several runtimes, in turns: what else the machine does falls on all alike.

    python -m benchmarks.speed --work FOLDER [--only NAME[:FORMAT] ...] [--rounds N] [--output FILE]
    python -m benchmarks.speed --print [FILE]

The checkpoint is random: 4 layers of GLM-4-9B's shape (hidden 4096, ffn 13696, 32 heads / 2 KV heads), a vocabulary of
8,192. Each runtime has an environment of its own in FOLDER, and its own format, made on first use. Decoding is timed a
token at a time behind 128 and 4,096 tokens, a prompt at 512 and 2,048.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.runtimes import Runnable, RuntimeFailed, Worker
from benchmarks.runtimes.prepare import LLAMA_CPP_PACKAGE, RUNTIMES, Preparation, prepared
from benchmarks.synthetic import write_synthetic
from glmexport.foundation import machine
from glmexport.foundation.target import HOST, open_target
from glmexport.validation.energy import Rapl, open_rapl
from glmexport.wire.device.facts import memory_bandwidth

RESULTS = Path(__file__).with_name("results")
WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
}
PROMPTS = (512, 2048)
CONTEXTS = (128, 4096)
#: What all others are divided by.
BASELINE = ("llama.cpp", "Q4_K_M")
_MARGIN = 256
#: A runtime that takes longer for the short prompt is not asked the long one, of four times as many tokens.
_SLOW_S = 20

Row = dict[str, Any]


class Contest:
    """Workers that take turns; one that fails is left out from then on, and why is kept."""

    def __init__(self, workers: dict[str, Worker], not_run: dict[str, str]) -> None:
        self.workers, self.not_run = workers, not_run
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
        self.joules: dict[str, list[float]] = {name: [] for name in workers}
        self.bandwidths: list[float] = []
        self.loads: list[float] = []
        energy = open_rapl()
        self.energy: Rapl | None = energy if isinstance(energy, Rapl) else None
        self.energy_absent_because = None if self.energy else str(energy)
        self._turn = 0
        #: That are not asked long prompts.
        self._slow: set[str] = set()

    def round(self, do: str, tokens: int, kept_as: str | None) -> None:
        """Every worker once, in the opposite order every other time; times are kept under a name, or not at all."""
        names = [name for name in self.workers if name not in self._slow]
        self._turn += 1
        for name in names if self._turn % 2 else names[::-1]:
            before = self.energy.read() if self.energy else ()
            try:
                taken = self.workers[name].seconds(do, tokens)
            except (RuntimeFailed, OSError) as error:
                self.not_run[name] = str(error)
                self.workers.pop(name).close()
                continue
            if kept_as:
                self.seconds[name].setdefault(kept_as, []).extend(taken)
            if do == "steps" and self.energy:
                self.joules[name].append(self.energy.joules(before, self.energy.read()) / len(taken))
        self.loads.append(os.getloadavg()[0])
        asked = [name for name in names if name in self.workers]
        print(f"{do} {tokens}: " + ", ".join(self._said(name, kept_as) for name in asked), flush=True)

    def _said(self, name: str, kept_as: str | None) -> str:
        return f"{name} {median(self.seconds[name][kept_as]) * 1e3:.1f} ms" if kept_as else name

    def run(self, rounds: int, long_rounds: int, steps: int, threads: int) -> None:
        """Everything that is timed."""
        short, long = PROMPTS
        for _ in range(rounds):
            self.bandwidths.append(memory_bandwidth(threads) or 0.0)
            self.round("start", short, f"prefill_{short}")
        few, many = CONTEXTS
        self.round("start", few, None)
        for _ in range(2 * rounds):
            self.round("steps", steps, f"decode_{few}")
        self.bandwidths.append(memory_bandwidth(threads) or 0.0)
        for name in self.workers:
            if median(self.seconds[name][f"prefill_{short}"]) > _SLOW_S:
                self._slow.add(name)
        for _ in range(long_rounds):
            self.round("start", long, f"prefill_{long}")
        self.round("extend", many - long, None)
        for _ in range(2 * rounds):
            self.round("steps", steps, f"decode_{many}")
        self.bandwidths.append(memory_bandwidth(threads) or 0.0)


def row_of(runnable: Runnable, worker: Worker, taken: dict[str, list[float]], at: Preparation, bandwidth: float) -> Row:
    """The figures of one runtime: rates by medians, and the best that was seen."""
    config = at.config
    cached = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    weights = at.block_weights + config["hidden_size"] * config["vocab_size"]
    row: Row = {
        "tool": runnable.tool,
        "format": runnable.format,
        "runtime": worker.runtime,
        "bits_per_weight": runnable.bits_per_weight,
        "load_s": worker.load_s,
        "peak_bytes": worker.peak_bytes(),
        "weight_bytes_per_token": runnable.bytes_per_token,
    }
    for tokens in PROMPTS:
        if not (seconds := taken.get(f"prefill_{tokens}")):
            continue
        row[f"prefill_{tokens}"] = {"median": tokens / median(seconds), "best": tokens / min(seconds)}
    for context in CONTEXTS:
        if not (seconds := taken.get(f"decode_{context}")):
            continue
        read = runnable.bytes_per_token + context * cached * runnable.cache_bytes
        row[f"decode_{context}"] = {
            "median": 1 / median(seconds),
            "best": 1 / min(seconds),
            "bytes_per_token": read,
            "roofline": bandwidth / read,
            "weights_per_s": weights / min(seconds),
        }
    return row


def table(document: dict[str, Any]) -> str:
    """The rows as Markdown; ratios are of medians, rates of what a quiet moment allowed are in brackets."""
    rows = document["rows"]
    base = next((row for row in rows if (row["tool"], row["format"]) == BASELINE), None)
    kinds = [*(f"decode_{context}" for context in CONTEXTS), *(f"prefill_{tokens}" for tokens in PROMPTS)]
    heads = [f"{kind.partition('_')[0]} {int(kind.partition('_')[2]):,}" for kind in kinds]
    lines = [
        f"| runtime | format | bits per weight | {' | '.join(heads)} "
        "| G weights/s | of roofline | at 4k | load s | peak MiB |",
        f"|---|---|---:|{'---:|' * len(kinds)}---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for kind in kinds:
            if kind not in row:
                cells.append("-")
                continue
            rate = row[kind]["median"]
            times = f", {rate / base[kind]['median']:.2f}×" if base and row is not base else ""
            cells.append(f"{rate:.1f} ({row[kind]['best']:.1f}){times}")
        decoded = [row.get(f"decode_{context}") for context in CONTEXTS]
        shares = [f"{each['best'] / each['roofline']:.0%}" if each else "-" for each in decoded]
        lines.append(
            f"| {row['tool']} | {row['format']} | {row['bits_per_weight']:.2f} | {' | '.join(cells)} "
            f"| {row[f'decode_{CONTEXTS[0]}']['weights_per_s'] / 1e9:.1f} | {shares[0]} | {shares[1]} "
            f"| {row['load_s']:.1f} | {row['peak_bytes'] / 2**20:.0f} |"
        )
    lines += ["", *(f"Not run: {name}: {reason}" for name, reason in document["not_run"].items())]
    return "\n".join(lines)


def measured(at: Preparation, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, run and describe."""
    not_run: dict[str, str] = {}
    runnables: dict[str, Runnable] = {}
    for name, found in prepared(at, options.only or list(RUNTIMES)):
        print(f"{name}: {'ready' if isinstance(found, Runnable) else found}", flush=True)
        if isinstance(found, Runnable):
            runnables[name] = found
        else:
            not_run[name] = found
    capacity = max(CONTEXTS) + 2 * options.rounds * (options.steps + 1) + _MARGIN
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, runnable in runnables.items():
            try:
                workers[name] = stack.enter_context(
                    Worker(runnable, capacity, options.threads, at.config["vocab_size"])
                )
            except (RuntimeFailed, OSError) as error:
                not_run[name] = str(error)
        contest = Contest(workers, not_run)
        contest.run(options.rounds, options.long_rounds, options.steps, options.threads)
        bandwidth = max(contest.bandwidths)
        rows = []
        for name, worker in workers.items():
            row = row_of(runnables[name], worker, contest.seconds[name], at, bandwidth)
            rows.append(row | ({"joules_per_token": median(contest.joules[name])} if contest.joules[name] else {}))
    return {
        "command": "python -m benchmarks.speed",
        "date": datetime.now(UTC).date().isoformat(),
        "checkpoint": WIDE,
        "processor": machine.processor_name(),
        "instruction_sets": machine.instruction_sets(),
        "threads": options.threads,
        "rounds": options.rounds,
        "long_rounds": options.long_rounds,
        "versions": machine.library_versions() | {"llama.cpp": LLAMA_CPP_PACKAGE},
        "memory_bandwidth_bytes_per_s": contest.bandwidths,
        "load_average": [round(load, 1) for load in contest.loads],
        "energy_absent_because": contest.energy_absent_because,
        "rows": rows,
        "not_run": not_run,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="environments, checkpoint and models")
    parser.add_argument("--only", action="append", metavar="NAME[:FORMAT]", help=f"of {', '.join(RUNTIMES)}")
    parser.add_argument("--target", default=HOST, help="of our bundles")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--rounds", type=int, default=4, help="of short prompts; twice as many of decoding")
    parser.add_argument("--long-rounds", type=int, default=2, help="of long prompts")
    parser.add_argument("--steps", type=int, default=12, help="tokens decoded in a round")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--print", type=Path, nargs="?", const=RESULTS / "speed.json", help="table of figures at hand")
    options = parser.parse_args()
    if options.print:
        print(table(json.loads(options.print.read_text(encoding="utf-8"))))
        return
    if not options.work:
        parser.error("--work is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    at = Preparation(options.work / "checkpoint", options.work, open_target(options.target).name)
    at.once("checkpoint", lambda out: write_synthetic(out, WIDE))
    document = measured(at, options)
    print(table(document))
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
