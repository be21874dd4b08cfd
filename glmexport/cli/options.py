"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import click
from click.core import ParameterSource

from glmexport.cli.console import Bytes
from glmexport.foundation.machine import cores

Command = Callable[..., object]


def checkpoint_argument(command: Command) -> Command:
    """Add the argument CHECKPOINT."""
    return click.argument("checkpoint", metavar="CHECKPOINT")(command)


def adapter_option(command: Command) -> Command:
    """Add the option --adapter."""
    return click.option(
        "--adapter",
        metavar="DIR",
        help="A LoRA fine-tune of the checkpoint to merge into it: a directory as PEFT writes it, or a hub id.",
    )(command)


def rehash_option(command: Command) -> Command:
    """Add the option --rehash."""
    return click.option(
        "--rehash",
        is_flag=True,
        help="Read every byte of the checkpoint for its digest, also of files that did not change since they were last "
        "read.",
    )(command)


def threads_option(command: Command) -> Command:
    """Add the option --threads."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=cores,
        show_default="physical cores",
        help="Threads of the build, of the bundle and of the original. A tuned target has its own for the bundle.",
    )(command)


def arithmetic_option(command: Command) -> Command:
    """Add the option --arithmetic."""
    return click.option(
        "--arithmetic",
        "wanted_arithmetic",
        type=click.Choice(["auto", "fp32"]),
        default="auto",
        show_default=True,
        help="How fp32 products are computed: auto takes the fastest library that a check on this machine finds to be "
        "as exact as fp32; fp32 takes torch's default.",
    )(command)


def workers_option(command: Command) -> Command:
    """Add the option --workers."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Quantize in so many processes on this machine, which share the cores and --max-memory.",
    )(command)


def threads_of_each(threads: int, workers: int) -> int:
    """Return the threads of each of so many ``workers``: a share of the cores, or ``threads`` if the user gave them."""
    given = bundle_threads(threads)
    return given or max(1, threads // workers)


def crowded(ranks: int, threads: int) -> str | None:
    """Return a remark where ``ranks`` on this machine have more ``threads`` together than there are cores."""
    if ranks == 1 or ranks * threads <= cores():
        return None
    return (
        f"{ranks} ranks of {threads} threads share {cores()} cores, and wait for one another: "
        f"{ranks * threads} threads run no faster than {cores()}. --threads is that of each rank."
    )


def bundle_threads(threads: int) -> int | None:
    """Return ``threads`` if the user gave them; None leaves those of the bundle to its target."""
    source = click.get_current_context().get_parameter_source("threads")
    return None if source is ParameterSource.DEFAULT else threads


def device_option(command: Command) -> Command:
    """Add the option --device."""
    return click.option(
        "--device",
        "device_name",
        metavar="NAME",
        default="cpu",
        show_default=True,
        help="Where to quantize: cpu, cuda, or one of several as cuda:1. Weights are brought there block by block.",
    )(command)


def policy_option(command: Command) -> Command:
    """Add the option --policy."""
    return click.option(
        "--policy",
        "policy_path",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Judge by the limits in this .toml file instead of the target's (README, 'Gates').",
    )(command)


def evaluation_options(command: Command) -> Command:
    """Add the options --evaluation, --positions and --questions."""
    text = click.option(
        "--evaluation",
        metavar="FILE",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Text of your own to judge on as well: .txt, or .jsonl with 'text' or 'messages' and, if you like, "
        "'language'; one document a line. May be repeated.",
    )
    positions = click.option(
        "--positions",
        type=click.IntRange(min=1),
        default=2048,
        show_default=True,
        help="Most tokens to judge on in each language, as far as there is text.",
    )
    questions = click.option(
        "--questions",
        type=click.IntRange(min=0),
        help="Most prompts in each language that both models answer freely; 0 asks your own tasks alone. Default: all, "
        "at most 13.",
    )
    return text(positions(questions(command)))


def full_text_option(command: Command) -> Command:
    """Add the option --full-text."""
    return click.option(
        "--full-text",
        is_flag=True,
        help="Judge on all of that text at once; otherwise a language's text ends once all its gates are decided.",
    )(command)


def tasks_option(command: Command) -> Command:
    """Add the option --tasks."""
    return click.option(
        "--tasks",
        "task_files",
        metavar="FILE",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Tasks of your own to ask both models, one JSON object a line (README, 'Your own tasks'); repeatable.",
    )(command)


def memory_option(command: Command) -> Command:
    """Add the option --max-memory."""
    return click.option("--max-memory", type=Bytes(), help="Keep the build below this much memory, for example 8GiB.")(
        command
    )


def budget_options(command: Command) -> Command:
    """Add the options --bpw and --size."""
    size = click.option(
        "--size",
        type=Bytes(),
        help="Choose the format of each matrix so that the bundle loses least within this size, for example 5.2GiB.",
    )
    bpw = click.option(
        "--bpw", type=click.FloatRange(min=0, min_open=True), help="As --size, in bits per weight, scales included."
    )
    return size(bpw(command))


def trust_options(command: Command) -> Command:
    """Add --key, --root and --subject: whose signature a bundle has to have, given to the command as ``trust``."""

    @wraps(command)
    def trusting(
        *arguments: object, key: Path | None, root: Path | None, subject: str | None, **others: object
    ) -> object:
        from glmexport.release.opening import Trust

        return command(*arguments, trust=Trust(key, root, subject), **others)

    return _signer_options(trusting)


def verification_options(command: Command) -> Command:
    """Add the options --key, --root, --subject and --newer-than."""
    newer = click.option(
        "--newer-than", type=click.IntRange(min=0), metavar="COUNTER",
        help="Refuse a release whose counter is not above this one.",
    )  # fmt: skip
    return _signer_options(newer(command))


def _signer_options(command: Command) -> Command:
    key = click.option("--key", type=click.Path(path_type=Path), metavar="PUBLIC.pem", help="Public key of who signed.")
    root = click.option(
        "--root", type=click.Path(path_type=Path), metavar="CA.pem",
        help="Root certificate that vouches for who signed; instead of --key.",
    )  # fmt: skip
    subject = click.option(
        "--subject", metavar="NAME",
        help="With --root: whom the signing certificate has to be of, as CN=Releases,O=Office,C=DE (RFC 4514) or "
        "email:releases@example.org.",
    )  # fmt: skip
    return key(root(subject(command)))


def arrival_options(command: Command) -> Command:
    """Add the option -o, those of verification, and --no-verify."""
    output = click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help="Directory of the bundle; must not exist.",
    )
    unverified = click.option(
        "--no-verify",
        is_flag=True,
        help="Take a bundle whose signature nobody verifies; digests are compared all the same.",
    )
    return output(verification_options(unverified(command)))


def registry_options(command: Command) -> Command:
    """Add the options of how a registry is reached."""
    authority = click.option(
        "--ca", type=click.Path(path_type=Path), metavar="CA.pem",
        help="Certificates that vouch for the registry, instead of the system's.",
    )  # fmt: skip
    auth_file = click.option(
        "--auth-file", type=click.Path(path_type=Path), metavar="FILE",
        help="Names and passwords as in docker's config.json. Or set GLMEXPORT_REGISTRY_USER and "
        "GLMEXPORT_REGISTRY_PASSWORD, or GLMEXPORT_REGISTRY_TOKEN.",
    )  # fmt: skip
    plain = click.option("--plain-http", is_flag=True, help="Do without TLS on other machines than this one, too.")
    token_host = click.option(
        "--token-host", "token_hosts", multiple=True, metavar="HOST[:PORT]",
        help="May ask for the password to give tokens for the registry, which alone gets it otherwise; repeatable.",
    )  # fmt: skip
    return authority(auth_file(token_host(plain(command))))


def json_option(command: Command) -> Command:
    """Add the option --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)
