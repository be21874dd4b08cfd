"""Verification of a bundle that arrives, by the options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from glmexport.cli.console import Terminal


def check_of(
    terminal: Terminal,
    key: Path | None,
    root: Path | None,
    subject: str | None,
    newer_than: int | None,
    no_verify: bool,
) -> Callable[[Path], object]:
    """Return the function that verifies a bundle before it is put in place.

    Raises:
        click.UsageError: there is nothing to verify with, and that was not asked for.
    """
    from glmexport.release.verification import verify

    if no_verify:
        if key or root or subject is not None or newer_than is not None:
            raise click.UsageError("--no-verify is for a bundle without a key to verify it with.")
        return lambda _: terminal.remark("The signature was not verified: nobody vouches for this bundle.")
    if (key is None) == (root is None):
        raise click.UsageError("Give what the signature is verified with: either --key or --root; or --no-verify.")
    if key and subject is not None:
        raise click.UsageError("--subject is of a certificate: give --root.")
    return lambda bundle: verify(bundle, key, root=root, newer_than=newer_than, subject=subject)
