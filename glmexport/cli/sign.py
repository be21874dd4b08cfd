"""``glmexport sign``: a bundle becomes a release, with all that is known of it under one signature."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmexport.cli.console import Terminal, emit
from glmexport.cli.options import bundle_threads, json_option, threads_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), metavar="PRIVATE.pem",
    help="Private key on the curve P-256, P-384 or P-521. The password of an encrypted one is read from "
    "GLMEXPORT_KEY_PASSWORD.",
)  # fmt: skip
@click.option(
    "--certificate", type=click.Path(path_type=Path), metavar="CERT.pem",
    help="Certificate of the key, put into the signature.",
)  # fmt: skip
@click.option(
    "--chain", multiple=True, type=click.Path(path_type=Path), metavar="CA.pem",
    help="Certificates above it, up to the root; repeatable.",
)  # fmt: skip
@click.option("--pkcs11", metavar="URI", help="A key in a hardware token, by its URI (RFC 7512), instead of --key.")
@click.option(
    "--counter", type=click.IntRange(min=0), show_default="seconds since 1970",
    help="Greater than that of every earlier release: by it a device refuses to go back.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Take a counter that is not above that of the release in the bundle.")
@click.option(
    "--golden/--no-golden", default=True, show_default=True,
    help="Record what the bundle answers to a prompt of each language, for devices to compare with.",
)  # fmt: skip
@threads_option
@json_option
def sign(
    bundle: Path,
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    pkcs11: str | None,
    counter: int | None,
    force: bool,
    golden: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Sign BUNDLE: its files, its report, its provenance and what it answers, so that no byte can change unnoticed."""
    import os

    from glmexport.bundle.bundle import Bundle
    from glmexport.release.keys import KeyFiles, open_signatory
    from glmexport.workflows.sign import sign_bundle

    _require_one_signer(key, certificate, chain, pkcs11)
    terminal = Terminal()
    opened = Bundle.open(bundle)
    signatory = open_signatory(KeyFiles(key, certificate, chain, pkcs11, os.environ.get("GLMEXPORT_KEY_PASSWORD")))
    signed = sign_bundle(
        opened,
        signatory,
        counter=counter,
        force=force,
        golden=golden,
        threads=bundle_threads(threads) or opened.target.session.threads or threads,
        progress=terminal,
    )
    release = signed.release
    terminal.facts(
        "Signed",
        {
            "bundle": str(bundle),
            "digest": release.bundle,
            "target": release.target,
            "counter": str(release.counter),
            "by": signatory.kind,
            "golden": release.golden or f"none: {release.golden_absent_because}",
            "files": str(len(signed.files)),
        },
    )
    if as_json:
        document = {**release.model_dump(), "signer": signatory.kind, "files": len(signed.files)}
        emit(json.dumps(document, indent=2, ensure_ascii=False))


def _require_one_signer(
    key: Path | None, certificate: Path | None, chain: tuple[Path, ...], pkcs11: str | None
) -> None:
    if (key is None) == (pkcs11 is None):
        raise click.UsageError("Give what signs: either --key or --pkcs11.")
    if (certificate is None) != (not chain):
        raise click.UsageError("--certificate and --chain belong together.")
    if pkcs11 and certificate:
        raise click.UsageError("A token signs without a certificate; leave --certificate out.")
