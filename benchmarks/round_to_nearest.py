"""GPTQ against round-to-nearest at the same format and in the same arithmetic, per language.

    python -m benchmarks.round_to_nearest [CHECKPOINT] [--format w4g32 ...] [--positions N] [--tokens N]
        [--accuracy-level 0]

Builds both recipes of each format, runs the exported graphs in ONNX Runtime on the evaluation corpora, and prints
the mean KL divergence from the original in nats per token and the ratio, worst language last. What the 8-bit head and
embedding and the int8 activations add is measured apart, over all languages.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import HOST, Target, open_target
from glmexport.report.document import Report
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.build import build
from glmexport.workflows.job import jobs_of
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions


def with_tokens(recipe: Recipe, tokens: int | None) -> Recipe:
    """The recipe, calibrated on another number of tokens."""
    if tokens is None or recipe.calibration is None:
        return recipe
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"tokens": tokens})})


def host(accuracy_level: int | None) -> Target:
    """This machine's target, with other arithmetic if asked for."""
    target = open_target(HOST)
    if accuracy_level is None:
        return target
    return target.model_copy(update={"weights": target.weights.model_copy(update={"accuracy_level": accuracy_level})})


def reports(
    checkpoint: str, formats: list[str], plan: ValidationPlan, tokens: int | None, threads: int, target: Target
) -> dict[str, Report]:
    """The report of each format's GPTQ recipe and of its round-to-nearest baseline, by recipe name."""
    terminal = Terminal()
    original = Original.open(checkpoint, terminal)
    options = BuildOptions(threads, validation=plan)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [recipe for form in formats for recipe in (form, f"rtn-{form}")]:
            (job,) = jobs_of(original, [target], name, Path(folder) / name)
            job = replace(job, recipe=with_tokens(job.recipe, tokens))
            (built,) = build(original, [job], options, terminal)
            found[name] = built.report
    return found


def rows(gptq: Report, nearest: Report) -> list[tuple[str, float, float, float]]:
    """(language, KL of GPTQ, KL of round-to-nearest, ratio), by ratio; the last row is over all positions."""
    theirs = {row.language: row.kl_mean_nats for row in nearest.fidelity.languages}
    table = [
        (row.language, row.kl_mean_nats, theirs[row.language], row.kl_mean_nats / theirs[row.language])
        for row in gptq.fidelity.languages
    ]
    ours, other = gptq.fidelity.overall.kl_mean_nats, nearest.fidelity.overall.kl_mean_nats
    return [*sorted(table, key=lambda row: row[3]), ("all", ours, other, ours / other)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--format", action="append", dest="formats", metavar="NAME", help="default: w4g32 and w4g128")
    parser.add_argument("--positions", type=int, default=2048, help="evaluated positions a language")
    parser.add_argument("--tokens", type=int, help="calibration tokens; default: the recipe's")
    parser.add_argument("--accuracy-level", type=int, choices=(0, 1, 2, 3, 4), help="default: the host's target's")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    formats = options.formats or ["w4g32", "w4g128"]
    plan = ValidationPlan(
        positions_per_language=options.positions,
        full_text=True,
        speed_seconds=0,
        prompt_tokens=16,
        generated_tokens=4,
        behaviour=None,
    )
    found = reports(options.checkpoint, formats, plan, options.tokens, options.threads, host(options.accuracy_level))
    document = {}
    for form in formats:
        gptq, nearest = found[form], found[f"rtn-{form}"]
        table = rows(gptq, nearest)
        print(f"\n{form}: {gptq.fidelity.arithmetic}, {gptq.fidelity.overall.positions} positions")
        print(f"{'language':10}{'GPTQ':>10}{'nearest':>10}{'ratio':>8}   (mean KL, nats per token)")
        for language, ours, theirs, ratio in table:
            print(f"{language:10}{ours:10.5f}{theirs:10.5f}{ratio:8.3f}")
        for name, report in (("GPTQ", gptq), ("nearest", nearest)):
            for share in report.shares:
                print(f"  {name:8} {share.name:34} {share.kl_mean_nats:+.5f}  {share.note}")
        for one, other in zip(gptq.routing, nearest.routing, strict=True):
            print(f"  layer {one.layer}: same experts at {one.same_set:.1%} of positions, nearest {other.same_set:.1%}")
        document[form] = {
            "rows": [dict(zip(("language", "gptq", "nearest", "ratio"), row, strict=True)) for row in table],
            "positions": gptq.fidelity.overall.positions,
            "bits_per_weight": gptq.size.bits_per_weight,
            "routing": {name: [row.model_dump() for row in found[name].routing] for name in (form, f"rtn-{form}")},
            "shares": {name: [share.model_dump() for share in found[name].shares] for name in (form, f"rtn-{form}")},
        }
    if options.output:
        first = next(iter(found.values()))
        facts = {
            "command": shlex.join(["python", "-m", "benchmarks.round_to_nearest", *sys.argv[1:]]),
            "checkpoint": first.subject.checkpoint,
            "checkpoint_digest": first.subject.checkpoint_digest,
            "processor": first.machine.processor,
            "versions": first.versions,
            "formats": document,
        }
        options.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
