"""``glmexport run``: streamed generation from a bundle, the way it is deployed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option, threads_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="What the user says.")
@click.option("--system", help="A system message before it.")
@click.option("--raw", is_flag=True, help="Continue the prompt as text, without the chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@threads_option
@json_option
def run(bundle: Path, prompt: str, system: str | None, raw: bool, max_tokens: int, threads: int, as_json: bool) -> None:
    """Generate from BUNDLE with onnxruntime-genai, greedily, and print the text as it comes."""
    from glmexport.bundle import read_manifest, verify_files
    from glmexport.checkpoint import Tokenizer
    from glmexport.generation import generate

    terminal = Terminal()
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    tokenizer = Tokenizer.open(bundle)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if raw or not tokenizer.has_chat_template:
        if not raw:
            terminal.remark("The bundle has no chat template; the prompt is continued as text.")
        ids = tokenizer.prefix + tokenizer.encode(prompt)
    else:
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    terminal.facts(
        "Run",
        {
            "bundle": f"{bundle} ({manifest.family}, {manifest.recipe.name}, {manifest.target.name})",
            "digest": manifest.digest(),
            "prompt": f"{len(ids)} tokens",
            "threads": str(threads),
        },
    )
    pieces = []
    for piece in generate(bundle, tokenizer, ids, max_tokens=max_tokens, threads=threads):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if as_json:
        document = {
            "prompt_tokens": len(ids),
            "tokens": [piece.token for piece in pieces],
            "text": "".join(piece.text for piece in pieces),
        }
        emit(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write("\n")
