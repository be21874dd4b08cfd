"""What it costs in divergence that calibration text passes the blocks in bf16 instead of fp32, and moments too.

    python -m benchmarks.coarse [CHECKPOINT ...] [--format w4g128 ...] [--positions N] [--output FILE]

Builds each format with each of them, on the same text and in the same threads, and prints the mean KL divergence from
the original in nats per token, over all languages and of the worst one. The bundles compute with fp32 activations
(accuracy_level 0), so that what int8 adds to all does not hide a difference.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.round_to_nearest import host
from glmexport.cli.console import Terminal
from glmexport.foundation import machine
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.build import build
from glmexport.workflows.job import jobs_of
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, Built

#: What a machine may choose; the ratios of speeds are not measured here.
CHOICES = (
    UNCHECKED,
    OriginalArithmetic(route=UNCHECKED.route, coarse_ratio=1.0),
    OriginalArithmetic(route=UNCHECKED.route, coarse_ratio=1.0, moments_ratio=1.0),
)


def measured(checkpoint: str, form: str, arithmetic: OriginalArithmetic, plan: ValidationPlan, threads: int) -> Built:
    """The bundle of one recipe, calibrated by ``arithmetic``."""
    terminal = Terminal()
    original = Original.open(checkpoint, terminal)
    with tempfile.TemporaryDirectory() as folder:
        (job,) = jobs_of(original, [host(0)], form, Path(folder) / "bundle")
        (built,) = build(original, [job], BuildOptions(threads, validation=plan, arithmetic=arithmetic), terminal)
    assert isinstance(built, Built)
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["demo"], metavar="CHECKPOINT")
    parser.add_argument("--format", action="append", dest="formats", metavar="NAME", help="default: w4g32 and w4g128")
    parser.add_argument("--positions", type=int, default=1024, help="evaluated positions a language")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    plan = ValidationPlan(
        positions_per_language=options.positions,
        full_text=True,
        speed_seconds=0,
        prompt_tokens=16,
        generated_tokens=4,
        behaviour=None,
        share_texts=0,
    )
    rows: list[dict[str, Any]] = []
    for checkpoint in options.checkpoints:
        for form in options.formats or ["w4g32", "w4g128"]:
            for arithmetic in CHOICES:
                built = measured(checkpoint, form, arithmetic, plan, options.threads)
                fidelity = built.report.fidelity
                worst = max(fidelity.languages, key=lambda row: row.kl_mean_nats)
                rows.append(
                    {
                        "checkpoint": "/".join(Path(checkpoint).parts[-2:]),
                        "format": form,
                        "calibration": arithmetic.label,
                        "kl_mean_nats": fidelity.overall.kl_mean_nats,
                        "worst_language": worst.language,
                        "worst_kl_mean_nats": worst.kl_mean_nats,
                        "positions": fidelity.overall.positions,
                    }
                )
    print(f"\n{'checkpoint':28}{'format':10}{'text':20}{'mean KL':>10}  worst language")
    for row in rows:
        print(
            f"{row['checkpoint']:28}{row['format']:10}{row['calibration']:20}{row['kl_mean_nats']:10.6f}  "
            f"{row['worst_language']} {row['worst_kl_mean_nats']:.6f}"
        )
    if options.output:
        facts = {
            "command": shlex.join(["python", "-m", "benchmarks.coarse", *sys.argv[1:]]),
            "processor": machine.processor_name(),
            "rows": rows,
        }
        options.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
