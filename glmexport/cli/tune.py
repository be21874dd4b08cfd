"""``glmexport tune``: the settings of a target that are fastest on this machine, within what they may cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from glmexport.cli.console import Terminal, emit, titled_table
from glmexport.cli.options import (
    adapter_option,
    arithmetic_option,
    checkpoint_argument,
    json_option,
    rehash_option,
)
from glmexport.report.arithmetic import brief_arithmetic
from glmexport.report.text import brief_ratio

if TYPE_CHECKING:
    from glmexport.foundation.evidence import Evidence, Gain, KvCache, Outcome, Preference, TriedCandidate
    from glmexport.reference.arithmetic_choice import Wanted

_STYLE = {"chosen": "bold green", "start": "bold", "front": "", "beaten": "dim", "illegal": "yellow"}


class Alternatives(click.ParamType[tuple[str, tuple[str, ...]]]):
    """The type of options that take a setting and the values to try, as KEY=VALUE,VALUE."""

    name = "setting"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[str, ...]]:
        """Convert to name and values."""
        name, _, values = str(value).partition("=")
        found = tuple(part.strip() for part in values.split(",") if part.strip())
        if not name.strip() or not found:
            self.fail(f"{value!r} is no setting with values; write KEY=VALUE,VALUE", param, ctx)
        return name.strip(), found


@click.command()
@checkpoint_argument
@adapter_option
@rehash_option
@click.option(
    "--target", "target_name", default="host", show_default=True,
    help="Where to start from: a name from 'glmexport targets list', a .toml file, or host.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The tuned target. Default: TARGET-tuned.toml.")
@click.option(
    "--prefer", type=click.Choice(["decode", "prefill", "balanced"]), default="balanced", show_default=True,
    help="What is to become fast.",
)  # fmt: skip
@click.option(
    "--allowance", type=click.FloatRange(min=0, max=1, min_open=True), default=0.25, show_default=True,
    help="Share of the target's gate on the mean divergence that arithmetic and formats may use up.",
)  # fmt: skip
@click.option(
    "--recipe", "recipes", multiple=True,
    help="A recipe to try beside the target's: a name or a .toml file. May be repeated. Default: all shipped ones with "
    "as many bits.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True,
    help="Threads to try. May be repeated. Default: all, three quarters, half and a quarter of the cores.",
)  # fmt: skip
@click.option(
    "--kv-cache", "kv_caches", type=click.Choice(["activations", "int8", "int4"]), multiple=True,
    help="A type of keys and values to try. May be repeated. Default: activations and int8, where there are kernels.",
)  # fmt: skip
@click.option(
    "--session-config", "session", type=Alternatives(), multiple=True, metavar="KEY=V,V",
    help="An entry of ONNX Runtime's session configuration and values to try. May be repeated.",
)  # fmt: skip
@click.option(
    "--provider-option", "provider", type=Alternatives(), multiple=True, metavar="KEY=V,V",
    help="An option of the execution provider and values to try. May be repeated.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=25, show_default=True, help="Of turns for each finalist."
)
@click.option(
    "--positions", type=click.IntRange(min=1), default=128, show_default=True,
    help="Tokens in each language to measure the divergence on.",
)  # fmt: skip
@click.option(
    "--prompt-tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Of the long prompt."
)
@click.option(
    "--calibrated", is_flag=True,
    help="Measure the divergence on weights that GPTQ made, which takes as long as a build for every recipe.",
)  # fmt: skip
@arithmetic_option
@click.option("--force", is_flag=True, help="Replace a target that exists.")
@json_option
def tune(
    checkpoint: str,
    adapter: str | None,
    rehash: bool,
    target_name: str,
    output: Path | None,
    prefer: Preference,
    allowance: float,
    recipes: tuple[str, ...],
    threads: tuple[int, ...],
    kv_caches: tuple[KvCache, ...],
    session: tuple[tuple[str, tuple[str, ...]], ...],
    provider: tuple[tuple[str, tuple[str, ...]], ...],
    seconds: float,
    positions: int,
    prompt_tokens: int,
    calibrated: bool,
    wanted_arithmetic: Wanted,
    force: bool,
    as_json: bool,
) -> None:
    """Try the legal settings of a target with CHECKPOINT on this machine, and write the best as a target.

    Measured are speed, in turns with what the target says now, and divergence. Finished measurements are kept until the
    tuning is done: after an interruption the same command goes on where it stopped.
    """
    from glmexport.foundation.machine import cores
    from glmexport.foundation.target import open_target
    from glmexport.reference.arithmetic_choice import choose_arithmetic
    from glmexport.tuning.options import TuneOptions
    from glmexport.workflows.original import Original
    from glmexport.workflows.tune import tune as tune_target

    terminal = Terminal()
    target = open_target(target_name)
    path = output or Path(f"{target.name}-tuned.toml")
    original = Original.open(checkpoint, terminal, adapter, rehash=rehash)
    options = TuneOptions(
        cores(),
        prefer=prefer,
        allowance=allowance,
        recipes=recipes,
        threads=threads,
        kv_caches=kv_caches,
        session=dict(session),
        provider=dict(provider),
        seconds=seconds,
        positions=positions,
        prompt_tokens=prompt_tokens,
        calibrated=calibrated,
        arithmetic=choose_arithmetic(wanted_arithmetic, cores(), terminal),
        force=force,
    )
    terminal.facts(
        "Tune",
        {
            "checkpoint": f"{original.checkpoint.name} ({original.checkpoint.path})",
            "target": f"{target.name}: {target.summary}",
            "prefer": prefer,
            "allowance": f"{allowance:g} of {target.gates.kl_mean_nats:g} nats",
            "output": str(path),
            "cores": str(options.cores),
            "arithmetic": brief_arithmetic(options.arithmetic),
        },
    )
    tuned = tune_target(original, target, path, options, terminal)
    evidence = tuned.evidence
    terminal.console.print(_table(evidence))
    terminal.console.print(_conditions(evidence), style="dim")
    terminal.console.print(Text.assemble(("verdict  ", "bold"), evidence.verdict), soft_wrap=True)
    terminal.console.print(f"target   {tuned.path}", soft_wrap=True)
    if as_json:
        document = {
            "target": str(tuned.path),
            "chosen": tuned.chosen.model_dump() if tuned.chosen else None,
            # Through text, which is where a number that is not finite becomes a string.
            "evidence": json.loads(evidence.model_dump_json()),
        }
        emit(json.dumps(document, indent=2, ensure_ascii=False))


def _table(evidence: Evidence) -> Table:
    """The start, the front, and the best of what may not be taken; how many others there were is told below."""
    from glmexport.tuning.candidates import label

    table = titled_table(
        "\nSpeed over the start's, and divergence",
        "settings", "decode", "at length", "prefill", "KL (nats)", "arithmetic", "worst language", "",
    )  # fmt: skip
    shown: tuple[Outcome, ...] = ("start", "chosen", "front")
    rows = [each for each in evidence.candidates if each.outcome in shown]
    for each in sorted(rows, key=_speed, reverse=True):
        figures = ["1.00x"] * 3
        if each.gains is not None:
            figures = [_cell(gain) for gain in (each.gains.decode, each.gains.decode_long, each.gains.prefill)]
        given = each.divergence
        divergence = ["-"] * 3
        if given is not None:
            worst = f"{given.original.worst:.4f} {given.original.language}"
            divergence = [f"{given.original.mean:.4f}", f"{given.arithmetic.mean:.1e}", worst]
        table.add_row(Text(label(each.settings)), *figures, *divergence, each.outcome, style=_STYLE[each.outcome])
    return table


def _speed(tried: TriedCandidate) -> float:
    return tried.gains.preferred.ratio if tried.gains else 1.0


def _cell(gain: Gain) -> str:
    known = gain.lower is not None and gain.upper is not None
    return brief_ratio(gain.ratio) + (f" ({gain.lower:.2f} to {gain.upper:.2f})" if known else "")


def _conditions(evidence: Evidence) -> str:
    beaten, illegal = (_count(evidence, outcome) for outcome in ("beaten", "illegal"))
    made = "GPTQ" if evidence.weights == "gptq" else "rounding to nearest"
    return (
        f"{len(evidence.candidates)} candidates: {beaten} beaten, {illegal} not legal; {evidence.timed}; "
        f"{evidence.prompt_tokens[0]} and {evidence.prompt_tokens[1]} prompt tokens, {evidence.generated_tokens} "
        f"generated; divergence over the whole model, weights by {made}"
        + _reasons(each for each in evidence.candidates if each.outcome == "illegal")
    )


def _count(evidence: Evidence, outcome: str) -> int:
    return sum(each.outcome == outcome for each in evidence.candidates)


def _reasons(tried: Iterable[TriedCandidate]) -> str:
    """Return each reason once, with its settings."""
    found = dict.fromkeys(
        f"\n{each.settings.recipe} at accuracy_level {each.settings.accuracy_level}: {each.reason}" for each in tried
    )
    return "".join(found)
