"""``glmexport package`` and ``unpack``: a signed bundle as an image layout or an offline kit, and back."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.arrival import check_of
from glmexport.cli.console import Bytes, Terminal, emit
from glmexport.cli.options import arrival_options, json_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--oci", type=click.Path(path_type=Path), metavar="DIR",
    help="Write an OCI image layout with the media types of ModelPack: what registries carry.",
)  # fmt: skip
@click.option("--tag", default="latest", show_default=True, help="Name of the image in the layout.")
@click.option(
    "--kit", type=click.Path(path_type=Path), metavar="DIR",
    help="Write volumes for media, and scripts that unpack and verify them with Python and openssl alone.",
)  # fmt: skip
@click.option("--volume-size", type=Bytes(), default="4GiB", show_default=True, help="Of a kit, at most.")
@json_option
def package(bundle: Path, oci: Path | None, tag: str, kit: Path | None, volume_size: int, as_json: bool) -> None:
    """Package a signed BUNDLE for a registry or for media; every file is compared with its signature on the way."""
    from glmexport.bundle.bundle import Bundle
    from glmexport.release.kit import write_kit
    from glmexport.release.layout import write_layout
    from glmexport.release.release import read_release

    if (oci is None) == (kit is None):
        raise click.UsageError("Give either --oci or --kit.")
    terminal = Terminal()
    release, opened = read_release(bundle), Bundle.open(bundle)
    facts = {"bundle": str(bundle), "digest": release.bundle, "counter": str(release.counter)}
    document: dict[str, object] = dict(facts) | {"counter": release.counter}
    if oci:
        digest = write_layout(opened, oci, terminal, tag)
        facts |= {"layout": str(oci), "image": digest}
        document |= {"layout": str(oci), "image": digest}
    if kit:
        volumes = write_kit(opened, kit, terminal, volume_size)
        facts |= {"kit": str(kit), "volumes": str(len(volumes))}
        document |= {"kit": str(kit), "volumes": volumes}
    terminal.facts("Packaged", facts)
    if as_json:
        emit(json.dumps(document, indent=2, ensure_ascii=False))


@click.command()
@click.argument("layout", type=click.Path(path_type=Path))
@arrival_options
@json_option
def unpack(
    layout: Path,
    output: Path,
    key: Path | None,
    root: Path | None,
    subject: str | None,
    newer_than: int | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Unpack the bundle in an image LAYOUT that package --oci wrote. (A kit has a script of its own for that.)"""
    from glmexport.release.layout import read_layout, unpack_layout
    from glmexport.release.release import read_release

    terminal = Terminal()
    check = check_of(terminal, key, root, subject, newer_than, no_verify)
    image, _, _ = read_layout(layout)
    unpack_layout(layout, output, check, terminal)
    release = read_release(output)
    terminal.facts("Unpacked", {"bundle": str(output), "digest": release.bundle, "image": image})
    if as_json:
        document = {"bundle": str(output), "digest": release.bundle, "counter": release.counter, "image": image}
        emit(json.dumps(document, indent=2, ensure_ascii=False))
