"""``glmexport verify``: whether a bundle is what somebody known has signed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import json_option, verification_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@verification_options
@json_option
def verify(
    bundle: Path, key: Path | None, root: Path | None, subject: str | None, newer_than: int | None, as_json: bool
) -> None:
    """Verify that every byte of BUNDLE is what was signed, and that nothing else is in it; exit code 65 if not."""
    from glmexport.release.verification import verify as verify_bundle

    found = verify_bundle(bundle, key, root=root, newer_than=newer_than, subject=subject)
    Terminal().facts(
        "Verified",
        {
            "bundle": str(bundle),
            "digest": found.digest,
            "target": found.target,
            "counter": str(found.counter),
            "files": str(found.files),
        },
    )
    if as_json:
        emit(json.dumps(found._asdict(), indent=2))
