"""``glmexport run``: streamed generation from a bundle, the way it is deployed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import bundle_threads, json_option, threads_option, trust_options
from glmexport.foundation.untrusted import visible

if TYPE_CHECKING:
    from glmexport.release.opening import Trust



@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="What the user says.")
@click.option("--system", help="A system message before it.")
@click.option(
    "--raw", is_flag=True,
    help="Continue the prompt as text, without the chat template. It may begin with the model's prefix; other control "
    "tokens that are written out in it are text.",
)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--speculate", type=click.Choice(["none", "lookup", "mtp"]), default="none", show_default=True,
    help="Guess tokens and verify several in one step: by what followed earlier in the text, or by the model's MTP "
    "layer where the bundle has it. The answer is the same but for rounding; whether it is faster depends on the text.",
)  # fmt: skip
@click.option(
    "--draft-tokens", type=click.IntRange(min=1), show_default="8 by lookup, 1 by mtp",
    help="Tokens guessed at a time, at most.",
)  # fmt: skip
@trust_options
@threads_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    system: str | None,
    raw: bool,
    max_tokens: int,
    speculate: str,
    draft_tokens: int | None,
    trust: Trust,
    threads: int,
    as_json: bool,
) -> None:
    """Generate from BUNDLE as it is deployed, greedily, and print the text as it comes."""
    from glmexport.engine.speculation import open_speculation
    from glmexport.engine.text import generate
    from glmexport.release.opening import open_signed

    terminal = Terminal()
    speculation = open_speculation(speculate, draft_tokens)
    opened = open_signed(bundle, trust, terminal)
    manifest, tokenizer = opened.manifest, opened.tokenizer
    threads = bundle_threads(threads) or opened.target.session.threads or threads
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if raw or not tokenizer.has_chat_template:
        if not raw:
            terminal.remark("The bundle has no chat template; the prompt is continued as text.")
        ids = tokenizer.sequence(prompt)
    else:
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    terminal.facts(
        "Run",
        {
            "bundle": f"{bundle} ({manifest.family}, {manifest.recipe.name}, {manifest.target.name})",
            "digest": opened.digest,
            "prompt": f"{len(ids)} tokens",
            "threads": str(threads),
            **({"speculation": f"{speculate}, {speculation.tokens} tokens at a time"} if speculation else {}),
        },
    )
    pieces = []
    for piece in generate(opened, ids, max_tokens=max_tokens, threads=threads, speculation=speculation):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(visible(piece.text, lines=True))
            sys.stdout.flush()
    if as_json:
        document = {
            "prompt_tokens": len(ids),
            "tokens": [piece.token for piece in pieces],
            "text": "".join(piece.text for piece in pieces),
            "speculation": {"method": speculate, **vars(speculation.tally)} if speculation else None,
        }
        emit(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if speculation:
        tally = speculation.tally
        share = f" ({tally.accepted / tally.drafted:.0%})" if tally.drafted else ""
        terminal.remark(f"{tally.accepted} of {tally.drafted} guessed tokens accepted{share}, in {tally.steps} steps.")
