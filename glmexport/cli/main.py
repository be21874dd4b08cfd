"""``glmexport``: the verbs, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback

# Before any of these libraries is imported: no telemetry, no network but where a hub id asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Where Rust code gives up, the message that follows says what happened; its frames say nothing to people.
os.environ["RUST_BACKTRACE"] = "0"

import click

from glmexport import __version__
from glmexport.cli.build import build
from glmexport.cli.compare import compare
from glmexport.cli.console import say
from glmexport.cli.convert import convert
from glmexport.cli.deploy import deploy, prune, rollback, status, units
from glmexport.cli.devices import devices
from glmexport.cli.inspect import inspect
from glmexport.cli.package import package, unpack
from glmexport.cli.reference import reference
from glmexport.cli.registry import pull, push
from glmexport.cli.report import report
from glmexport.cli.run import run
from glmexport.cli.serve import serve
from glmexport.cli.sign import sign
from glmexport.cli.targets import targets
from glmexport.cli.tune import tune
from glmexport.cli.validate import validate
from glmexport.cli.verify import verify
from glmexport.foundation.errors import EXIT_BUG, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE, GlmexportError
from glmexport.foundation.extras import missing_package
from glmexport.foundation.untrusted import visible


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glmexport")
def cli() -> None:
    """Turn open-weight GLM checkpoints into validated ONNX bundles on hardware of your own.

    Exit codes: 0 PASS or WARN, 1 BLOCK, 2 INCONCLUSIVE, 64 unusable input, 65 not what was signed, 69 the machine
    (disk, memory, network), 70 a bug, 130 interrupted.
    """


for command in (
    build, compare, convert, deploy, devices, inspect, package, prune, pull, push, reference, report, rollback, run,
    serve, sign, status, targets, tune, units, unpack, validate, verify,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command())


def run_command() -> int:
    """Run the command that the arguments name, tell what went wrong, and return the exit code."""
    try:
        code = cli.main(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(visible(said.getvalue(), lines=True), err=True, nl=False)
        return EXIT_INPUT
    except GlmexportError as error:
        return tell(error)
    except (click.exceptions.Abort, KeyboardInterrupt, MemoryError, OSError) as error:
        return _say(*_from_outside(error))
    except Exception as error:
        absent = missing_package(error) if isinstance(error, ImportError) else None
        if absent:
            return tell(absent)
        click.echo(visible(traceback.format_exc(), lines=True), err=True, nl=False)
        return _say("This is a bug in glmexport.", "Please report it with the lines above.", EXIT_BUG)


def tell(error: GlmexportError) -> int:
    """Say what happened and what to do about it; return the exit code."""
    return _say(error.message, error.next_step, error.exit_code)


def _from_outside(error: BaseException) -> tuple[str, str, int]:
    """Return message, next step and exit code of an error that the user or the system caused."""
    if isinstance(error, MemoryError):
        return "There is not enough memory.", "Set a lower --max-memory, or free some.", EXIT_MACHINE
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        message = f"The system refused: {error.strerror or error}{where}."
        return message, "Check free space and permissions; then run the same command again.", EXIT_MACHINE
    step = "Run the same command again; a build goes on after its last finished block."
    return "Interrupted.", step, EXIT_INTERRUPTED


def _say(message: str, next_step: str, code: int) -> int:
    say("ERROR" if code != EXIT_INTERRUPTED else "STOP", message, next_step)
    return code
