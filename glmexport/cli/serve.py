"""``glmexport serve``: a bundle behind an OpenAI-compatible API."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli.console import Bytes, Terminal, emit
from glmexport.cli.options import bundle_threads, json_option, threads_option, trust_options
from glmexport.foundation.errors import EXIT_PASS, InputError, MachineError

if TYPE_CHECKING:
    from glmexport.release.opening import Trust



@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--api-key-file", "key_file", metavar="FILE", type=click.Path(path_type=Path),
    help="Keys that clients send, one a line; only you may read it. Needed where others can connect.",
)  # fmt: skip
@click.option("--allow-host", "hosts", metavar="NAME", multiple=True, help="A name clients reach it by; repeatable.")
@click.option("--name", help="Name of the model; by default that of its checkpoint.")
@click.option(
    "--parallel", type=click.IntRange(min=1), default=4, show_default=True,
    help="Answers that take turns; each has caches in memory.",
)  # fmt: skip
@click.option(
    "--max-queue", "waiting", type=click.IntRange(min=1), default=64, show_default=True,
    help="Requests that may wait beside them; more are refused with 429.",
)  # fmt: skip
@click.option(
    "--max-tokens", "answer_tokens", type=click.IntRange(min=1), default=4096, show_default=True,
    help="Tokens of one answer at most.",
)  # fmt: skip
@click.option("--max-body", "body_bytes", type=Bytes(), default="4MiB", show_default=True, help="Size of one request.")
@click.option(
    "--drain-s", type=click.FloatRange(min=0), default=30, show_default=True,
    help="Seconds that running answers have after SIGTERM.",
)  # fmt: skip
@click.option(
    "--head-s", type=click.FloatRange(min=0, min_open=True), default=10, show_default=True,
    help="Seconds in which the head of a request has to arrive.",
)  # fmt: skip
@click.option(
    "--speculate", type=click.Choice(["none", "lookup"]), default="none", show_default=True,
    help="Guess tokens by what followed earlier in the text, and verify several in one step.",
)  # fmt: skip
@click.option(
    "--reuse/--no-reuse", default=True, show_default=True,
    help="Go on with what an earlier request computed where a prompt begins with it.",
)  # fmt: skip
@click.option(
    "--batch", is_flag=True,
    help="Compute the next tokens of all answers in one step: more tokens a second where several ask, and answers that "
    "depend, by rounding, on who else asks.",
)  # fmt: skip
@click.option("--lenient", is_flag=True, help="Repair tool calls that do not follow the grammar, and count them.")
@trust_options
@threads_option
@json_option
def serve(
    bundle: Path,
    host: str,
    port: int,
    key_file: Path | None,
    hosts: tuple[str, ...],
    name: str | None,
    parallel: int,
    waiting: int,
    answer_tokens: int,
    body_bytes: int,
    drain_s: float,
    head_s: float,
    speculate: str,
    reuse: bool,
    batch: bool,
    lenient: bool,
    trust: Trust,
    threads: int,
    as_json: bool,
) -> None:
    """Serve BUNDLE to clients of OpenAI's API, on this machine alone unless told otherwise.

    A socket that systemd hands over is taken in place of --host and --port. SIGTERM lets running answers end.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"A part of the server is not installed: {error.name}.", next_step="pip install 'glmexport[serve]'"
        ) from error

    from glmexport.engine.speculation import DEFAULT_TOKENS
    from glmexport.serving.limits import ServingLimits
    from glmexport.serving.log import logged_to
    from glmexport.serving.server import ServeOptions, Serving
    from glmexport.serving.server import serve as run

    if batch and speculate != "none":
        raise InputError("Tokens are either guessed or computed together.", next_step="Leave out one of the two.")
    terminal = Terminal()

    def tell(serving: Serving) -> None:
        where = "a socket that was handed over" if serving.inherited else serving.url
        terminal.facts(
            "Serve",
            {"model": serving.name, "digest": serving.digest, "threads": str(serving.threads), "listens on": where},
        )
        if as_json:
            emit(json.dumps({"url": serving.url, "digest": serving.digest, "pid": os.getpid(), "model": serving.name}))

    options = ServeOptions(
        cores=threads,
        threads=bundle_threads(threads),
        host=host,
        port=port,
        key_file=key_file,
        name=name,
        hosts=hosts,
        drain_s=drain_s,
        lenient=lenient,
        parallel=parallel,
        waiting=waiting,
        guesses=DEFAULT_TOKENS["lookup"] if speculate == "lookup" else 0,
        reuse=reuse,
        batch=batch,
        trust=trust,
        limits=ServingLimits(body_bytes=body_bytes, answer_tokens=answer_tokens, head_s=head_s),
    )
    with logged_to(sys.stderr):
        ended = run(bundle, options, tell, terminal)
    if not ended:
        # The runtime still computes a step that nobody waits for, which a teardown in order would wait for.
        sys.stdout.flush()
        os._exit(EXIT_PASS)
