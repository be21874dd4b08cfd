"""How near to the original each quantizer stays: one checkpoint, the same text and the same judge for all.

    python -m benchmarks.quality [CHECKPOINT] --work FOLDER [--format w4g128 ...] [--mixed 4.6 ...] [--tool NAME ...]
        [--ablation [FORMAT]] [--finished] [--output FILE]

Each tool quantizes the linears of the decoder blocks in an environment of its own (made in FOLDER on first use), on
the same calibration tokens; embedding and lm_head stay as they are. The dequantized weights are run in transformers'
fp32 arithmetic on the evaluation corpora. Every run is kept in FOLDER, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import ADDED_UP, NOT_RUN, ONE_AT_A_TIME, PEERS, PeerFailed, run_peer
from benchmarks.peers.environments import EnvironmentFailed
from benchmarks.table import ablation, headline, overview, table
from glmexport.calibration.corpus import shipped_documents
from glmexport.calibration.sequences import pack
from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.foundation.recipe import CalibrationPlan, Format, open_recipe
from glmexport.reference.reference import Reference
from glmexport.validation.divergence import Divergence
from glmexport.validation.fidelity import Streamed, compare, summarize
from glmexport.validation.reference import ReferenceStates, reference_states
from glmexport.validation.texts import EvaluationText, evaluation_texts
from glmexport.workflows.original import Original

FORMATS = ("w4g32", "w4g64", "w4g128", "w4g32-sym", "w4g64-sym", "w4g128-sym")
MIXED = (3.2, 4.25, 4.6, 5.0)
#: What is compared where nothing else is asked for: each tool as it comes, and what may be its best.
TOOLS: dict[str, tuple[str, ...]] = {
    "glmexport": ("default", "nearest", "nearest, searched"),
    "gptqmodel": ("default", "mse", "act-order-mse"),
    "auto-round": ("default",),
    "onnxruntime": ("default", "rtn", "k_quant", "hqq", "gptq"),
    "hqq": ("default",),
    "nncf": ("awq-scale-estimation",),
    "llama-cpp": ("default", "imatrix", "Q4_K_M", "Q4_K_M-imatrix"),
    "llm-compressor": ("default", "mse"),
}


@dataclass(frozen=True)
class Run:
    """One quantization: a format of all linears, or a mix within ``bits_per_weight``."""

    tool: str
    setting: str
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    bits_per_weight: float | None = None

    @property
    def format(self) -> str:
        """As recipes are named; mixes by their limit."""
        if self.bits_per_weight:
            return f"mixed {self.bits_per_weight:g}"
        return f"w{self.bits}g{self.group_size}{'-sym' if self.symmetric else ''}"

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^\w.]+", "-", f"{self.tool}-{self.setting}-{self.format}")


@dataclass
class Judge:
    """The original's states on the evaluation text, and what another set of weights makes of the same text."""

    reference: Reference
    texts: list[EvaluationText]
    original: ReferenceStates
    tokenizer: Any
    work: Path
    terminal: Terminal

    def judge(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Fidelity of the model with ``weights`` in the original's place."""
        given = self.reference.exchanged(weights.get)
        states = reference_states(given, self.texts, self.work, self.terminal, label="Judging")
        original = Streamed(self.original, self.reference)
        parts = compare(original, lambda i: self.reference.logits(states.states(i)), self.terminal, "Comparing")
        found = summarize(self.texts, parts, self.tokenizer, "fp32")
        kl = Divergence.concatenate(parts).kl.double()
        worst = max(found.languages, key=lambda row: row.kl_mean_nats)
        return {
            "kl_mean_nats": found.overall.kl_mean_nats,
            "kl_p99_nats": found.overall.kl_p99_nats,
            "kl_p999_nats": float(kl.quantile(0.999)),
            "top1_agreement": found.overall.top1_agreement,
            "perplexity_ratio": found.overall.perplexity_bundle / found.overall.perplexity_original,
            "worst_language": worst.language,
            "kl_worst_language_nats": worst.kl_mean_nats,
            "kl_by_language_nats": {row.language: row.kl_mean_nats for row in found.languages},
            "positions": found.overall.positions,
        }


def prepare(original: Original, tokens: int, path: Path) -> None:
    """Write the calibration file that every tool reads."""
    planned = open_recipe("w4g128").calibration
    assert planned is not None
    plan = CalibrationPlan(tokens=tokens, sequence_length=planned.sequence_length, quota=planned.quota)
    found = pack(shipped_documents("calibration"), original.tokenizer, plan, original.architecture.context_length)
    facts = {"languages": found.languages, "prefix": found.prefix}
    save_file({"ids": found.ids, "selection": found.selection}, path, {"facts": json.dumps(facts)})


def judge_of(original: Original, positions: int, work: Path, terminal: Terminal) -> Judge:
    texts = evaluation_texts(
        shipped_documents("evaluation"), original.tokenizer, positions_per_language=positions, longest=512
    )
    reference = Reference(original.checkpoint, original.architecture)
    states = reference_states(reference, texts, work, terminal)
    return Judge(reference, texts, states, original.tokenizer, work, terminal)


def uniform(text: str) -> Format:
    """The format that recipes call so, for argparse."""
    found = re.fullmatch(r"w(\d)g(\d+)(-sym)?", text)
    if found is None:
        raise ValueError(text)
    bits, group_size, symmetric = found.groups()
    return Format.model_validate({"bits": int(bits), "group_size": int(group_size), "symmetric": symmetric is not None})


def runs(formats: list[Format], mixed: list[float], tools: list[str]) -> Iterator[Run]:
    """Every combination that the tools can do; ``tools`` are names, or name:setting."""
    for run, lack in combinations(formats, tools):
        if lack is None:
            yield run
    for limit in mixed:
        for name in tools:
            tool, _, only = name.partition(":")
            if PEERS[tool].mixes and only in ("", "default"):
                yield Run(tool, "default", bits_per_weight=limit)


def lacking(formats: list[Format], tools: list[str]) -> Iterator[tuple[Run, str]]:
    """The combinations that there are not, and why."""
    return ((run, lack) for run, lack in combinations(formats, tools) if lack is not None)


def combinations(formats: list[Format], tools: list[str]) -> Iterator[tuple[Run, str | None]]:
    """Formats with settings of tools, and why there is no such thing."""
    for form in formats:
        for name in tools:
            tool, _, only = name.partition(":")
            for setting in (only,) if only else TOOLS[tool]:
                run = Run(tool, setting, form.bits, form.group_size, form.symmetric)
                yield run, PEERS[tool].lacks(setting, form.bits, form.group_size, form.symmetric)


def grouped(reasons: Iterable[tuple[Run, str]]) -> dict[str, str]:
    """Reasons by tool, setting and the formats that share them."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, reason in reasons:
        found.setdefault((f"{run.tool}, {run.setting}", reason), []).append(run.format)
    return {f"{name} ({', '.join(formats)})": reason for (name, reason), formats in found.items()}


def ablations(form: Format) -> Iterator[Run]:
    """Our solver without one part at a time, and its parts added one after another."""
    for setting in dict.fromkeys((*ADDED_UP, *ONE_AT_A_TIME)):
        yield Run("glmexport", setting, form.bits, form.group_size, form.symmetric)


def finished(run: Run, work: Path) -> dict[str, Any] | None:
    """The row of ``run`` if it was done before."""
    record = work / "runs" / f"{run.slug}.json"
    return dict(json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else None


def measure(run: Run, original: Original, judge: Judge, work: Path) -> dict[str, Any]:
    """Quantize and judge; the row is kept for ``finished``."""
    weights = work / f"{run.slug}.safetensors"
    facts = run_peer(
        work / "environments",
        run.tool,
        run.setting,
        original.checkpoint.path,
        work / "calibration.safetensors",
        weights,
        run.bits,
        run.group_size,
        run.symmetric,
        bits_per_weight=run.bits_per_weight,
    )
    row = {**asdict(run), "format": run.format, **judge.judge(load_file(weights)), **facts}
    weights.unlink()
    record = work / "runs" / f"{run.slug}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def measured(
    asked: list[Run], original: Original, positions: int, work: Path, terminal: Terminal, only_finished: bool
) -> tuple[list[dict[str, Any]], list[tuple[Run, str]]]:
    """(rows, what was not run and why); nothing is judged twice, and nothing at all if ``only_finished``."""
    rows: list[dict[str, Any]] = []
    failures: list[tuple[Run, str]] = []
    judge: Judge | None = None
    for run in asked:
        row = finished(run, work)
        if row is None and only_finished:
            failures.append((run, "not run yet"))
            continue
        try:
            if row is None:
                judge = judge or judge_of(original, positions, work, terminal)
                row = measure(run, original, judge, work)
        except (PeerFailed, EnvironmentFailed) as error:
            failures.append((run, str(error)[-2000:]))
        else:
            rows.append(row)
            print(f"{row['kl_mean_nats']:.6f} {run.tool}, {run.setting}, {run.format}", flush=True)
    return rows, failures


def document(
    rows: list[dict[str, Any]], not_run: dict[str, str], original: Original, work: Path, tokens: int
) -> dict[str, Any]:
    """What is kept of a benchmark. GPTQModel's log of every matrix is not."""
    paths = {argument: Path(argument).name for argument in sys.argv[1:] if Path(argument).is_absolute()}
    paths[str(work)] = "FOLDER"
    return {
        "command": shlex.join(
            ["python", "-m", "benchmarks.quality", *(paths.get(word, word) for word in sys.argv[1:])]
        ),
        "date": date.today().isoformat(),
        "checkpoint": original.checkpoint.name,
        "checkpoint_digest": original.checkpoint.digest(),
        "calibration_tokens": tokens,
        "processor": machine.processor_name(),
        "threads": machine.cores(),
        "rows": [{key: value for key, value in row.items() if key != "log"} for row in rows],
        "not_run": not_run,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="environments, calibration text and finished runs")
    parser.add_argument("--format", action="append", type=uniform, dest="formats", help=f"default: {' '.join(FORMATS)}")
    parser.add_argument("--mixed", action="append", type=float, metavar="BPW", help=f"default: {MIXED}")
    parser.add_argument("--tool", action="append", dest="tools", metavar="NAME[:SETTING]", help="default: all")
    parser.add_argument(
        "--ablation", nargs="?", const=uniform("w4g128"), type=uniform, metavar="FORMAT", help="default: w4g128"
    )
    parser.add_argument("--tokens", type=int, default=49152, help="of calibration text")
    parser.add_argument("--positions", type=int, default=1024, help="evaluated positions a language")
    parser.add_argument("--finished", action="store_true", help="run nothing: print what was run before")
    parser.add_argument("--output", type=Path, help="write the rows there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(machine.cores())
    terminal = Terminal()
    options.work.mkdir(parents=True, exist_ok=True)
    original = Original.open(options.checkpoint, terminal)
    calibration = options.work / "calibration.safetensors"
    if not calibration.is_file():
        prepare(original, options.tokens, calibration)
    nothing_named = not (options.formats or options.mixed or options.ablation)
    formats = options.formats or ([uniform(name) for name in FORMATS] if nothing_named else [])
    mixed = options.mixed or (list(MIXED) if nothing_named else [])
    parts = options.ablation or (uniform("w4g128") if nothing_named and not options.tools else None)
    tools = options.tools or list(TOOLS)
    asked = list(dict.fromkeys((*runs(formats, mixed, tools), *(ablations(parts) if parts else ()))))
    rows, failures = measured(asked, original, options.positions, options.work, terminal, options.finished)
    not_run = NOT_RUN | grouped((*lacking(formats, tools), *failures))
    tables = [overview(rows), table(headline(rows, TOOLS))] if formats or mixed else []
    tables += [ablation(rows, parts.label)] if parts else []
    print("\n\n".join(tables))
    for name, reason in not_run.items():
        print(f"not run: {name}: {reason}")
    if options.output:
        tokens = int(load_file(calibration)["ids"].numel())
        found = document(rows, not_run, original, options.work, tokens)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
