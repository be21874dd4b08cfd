"""``glmexport push`` and ``pull``: releases to and from a registry of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.arrival import check_of
from glmexport.cli.console import Bytes, Terminal, emit
from glmexport.cli.options import arrival_options, json_option, registry_options
from glmexport.report.text import brief_size


@click.command()
@click.argument("layout", type=click.Path(path_type=Path))
@click.argument("image", metavar="HOST/NAME:TAG")
@registry_options
@json_option
def push(
    layout: Path,
    image: str,
    ca: Path | None,
    auth_file: Path | None,
    token_hosts: tuple[str, ...],
    plain_http: bool,
    as_json: bool,
) -> None:
    """Send the image LAYOUT that package --oci wrote to a registry; what is there already is not sent again."""
    from glmexport.release.access import ImageReference, RegistryAccess
    from glmexport.release.transfer import push as push_layout

    terminal = Terminal()
    reference = ImageReference.parse(image)
    access = RegistryAccess.given(reference.host, ca, auth_file, plain_http=plain_http, token_hosts=token_hosts)
    pushed = push_layout(layout, reference, access, terminal)
    terminal.facts(
        "Pushed",
        {
            "image": f"{reference.host}/{reference.name}@{pushed.digest}",
            "sent": f"{len(pushed.sent)} blobs, {brief_size(pushed.sent_bytes)}",
            "already there": f"{len(pushed.present)} blobs",
        },
    )
    if as_json:
        emit(json.dumps({"image": str(reference), **vars(pushed)}, indent=2, ensure_ascii=False))


@click.command()
@click.argument("image", metavar="HOST/NAME@sha256:DIGEST")
@arrival_options
@click.option("--max-size", type=Bytes(), help="Refuse an image that says it has more, as 40GiB.")
@registry_options
@json_option
def pull(
    image: str,
    output: Path,
    key: Path | None,
    root: Path | None,
    subject: str | None,
    newer_than: int | None,
    no_verify: bool,
    max_size: int | None,
    ca: Path | None,
    auth_file: Path | None,
    token_hosts: tuple[str, ...],
    plain_http: bool,
    as_json: bool,
) -> None:
    """Get a bundle from a registry, by its digest or by a tag, and verify it before it is put in place."""
    from glmexport.release.access import ImageReference, RegistryAccess
    from glmexport.release.release import read_release
    from glmexport.release.transfer import pull as pull_bundle

    terminal = Terminal()
    check = check_of(terminal, key, root, subject, newer_than, no_verify)
    reference = ImageReference.parse(image)
    access = RegistryAccess.given(reference.host, ca, auth_file, plain_http=plain_http, token_hosts=token_hosts)
    digest = pull_bundle(reference, output, check, access, terminal, max_size)
    release = read_release(output)
    terminal.facts("Pulled", {"bundle": str(output), "digest": release.bundle, "image": digest})
    if as_json:
        document = {"bundle": str(output), "digest": release.bundle, "counter": release.counter, "image": digest}
        emit(json.dumps(document, indent=2, ensure_ascii=False))
