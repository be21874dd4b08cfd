"""``glmexport convert``: a bundle as a checkpoint of another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import adapter_option, json_option, rehash_option, trust_options
from glmexport.report.text import brief_size

if TYPE_CHECKING:
    from glmexport.release.opening import Trust



@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", "checkpoint", required=True, help="The checkpoint that the bundle was built from.")
@adapter_option
@rehash_option
@click.option("--to", "to", type=click.Choice(["gptq"]), required=True, help="The format to write.")
@click.option(
    "--layout", type=click.Choice(["gptqmodel", "transformers"]), default="gptqmodel", show_default=True,
    help="Who reads it: GPTQModel holds gate and up of every MLP as two matrices, transformers (with optimum) as one.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the checkpoint goes.")
@click.option("--force", is_flag=True, help="Replace a GPTQ checkpoint that exists.")
@trust_options
@json_option
def convert(
    bundle: Path,
    checkpoint: str,
    adapter: str | None,
    rehash: bool,
    to: str,
    layout: str,
    output: Path,
    force: bool,
    trust: Trust,
    as_json: bool,
) -> None:
    """Write the quantized linears of BUNDLE, code by code, into a GPTQ checkpoint.

    Embedding, lm_head, norms and biases are those of the original, in its own precision.
    """
    from glmexport.assembly.gptq import Layout
    from glmexport.bundle.bundle import Bundle
    from glmexport.workflows.convert import convert_to_gptq
    from glmexport.workflows.original import Original

    terminal = Terminal()
    opened = Bundle.open(bundle)
    original = Original.open(checkpoint, terminal, adapter, rehash=rehash)
    terminal.facts(
        "Convert",
        {
            "bundle": str(bundle),
            "digest": opened.digest,
            "against": f"{original.checkpoint.name} ({original.checkpoint.path})",
            "recipe": opened.manifest.recipe.name,
            "to": f"{to}, as {layout} reads it",
            "output": str(output),
        },
    )
    chosen: Layout = next(known for known in get_args(Layout) if known == layout)
    written = convert_to_gptq(
        opened, original, output, layout=chosen, force=force, trust=trust, progress=terminal
    )
    settings = written.settings
    terminal.facts(
        "Written",
        {
            "checkpoint": str(output),
            "format": f"{settings['checkpoint_format']}, {settings['bits']} bits, group_size "
            f"{settings['group_size']}, {'symmetric' if settings['sym'] else 'asymmetric'}",
            "size": brief_size(written.bytes),
        },
    )
    if as_json:
        document = {"checkpoint": str(output), "bytes": written.bytes, "quantization_config": settings}
        emit(json.dumps(document, indent=2, ensure_ascii=False))
