#!/usr/bin/env python3
"""Verify a signed bundle with Python and openssl alone: every byte of it is what was signed, and nothing else is there.

    python3 verify.py DIRECTORY --key PUBLIC.pem | --root CA.pem [--subject NAME] [--newer-than COUNTER] [--json]

Needs Python 3.9 or later and the program openssl (1.1.1 or later); no package, no network. It is shipped in each
signed bundle, but take it from where you trust: one that came with a bundle could have been changed with it.

The signature is that of OpenSSF Model Signing (model.sig: a sigstore bundle, in it a DSSE envelope, in it an in-toto
statement with the SHA-256 of every file). A chain of certificates is judged at the time at which the signing
certificate became valid, since the signature carries no time of its own. Certificates have to be for signing code: one
for TLS signs no release. NAME is who may sign, as RFC 4514 writes a distinguished name (CN=Releases,O=Office,C=DE), or
one of the certificate's other names (email:releases@example.org, DNS:..., URI:...).

Exit codes: 0 verified, 64 unusable arguments, 65 not what was signed, 69 openssl or the disk failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from glmexport.release.certificates import Certificate, UnfitCertificate, check_chain, from_pem, hash_of_key, to_pem
from glmexport.release.encodings import decode_base64, is_ecdsa_signature
from glmexport.release.envelope import (
    DIGEST,
    EXIT_MACHINE,
    EXIT_REFUSED,
    EXIT_USAGE,
    PAYLOAD_TYPE,
    SIGNATURE,
    Envelope,
    VerificationError,
    check_names,
    is_legal_name,
    linked_in_cache,
    parse,
    read_envelope,
    read_file,
    signed_files,
)

__all__ = [
    "EXIT_MACHINE",
    "EXIT_REFUSED",
    "EXIT_USAGE",
    "SIGNATURE",
    "Envelope",
    "VerificationError",
    "VerifiedBundle",
    "check_names",
    "is_legal_name",
    "parse",
    "read_envelope",
    "signed_files",
    "verify",
]

MANIFEST, RELEASE, ATTESTATIONS = "bundle.json", "release.json", "attestations"
#: Files that may be in a bundle beside those that its manifest lists, as well as ``attestations/NAME.json``.
BESIDE = frozenset(
    {SIGNATURE, MANIFEST, RELEASE, "golden.json", "verify.py", "report.json", "report.html", "report.md", "report.xml"}
)
_RELEASED = ("format", "version", "bundle", "counter", "target")


class VerifiedBundle(NamedTuple):
    """The facts that hold: digest of the bundle, counter of its release, number of signed files, name of its target."""

    digest: str
    counter: int
    files: int
    target: str


def verify(
    directory: Path, key: Path | None, root: Path | None, newer_than: int | None, subject: str | None = None
) -> VerifiedBundle:
    """Verify all that there is to verify; raises VerificationError."""
    directory = Path(os.path.realpath(directory))
    envelope = read_envelope(directory)
    check_signature(envelope, key, root, subject)
    signed = signed_files(envelope.payload)
    check_files(directory, signed)
    check_manifest(directory, signed)
    return check_release(directory, signed, newer_than)


def check_material(envelope: Envelope, key: Path | None, root: Path | None, subject: str | None = None) -> None:
    """Check that what was given to verify with is there, and of the kind that signed."""
    path, kind = (key, "PUBLIC KEY") if key else (root, "CERTIFICATE")
    if path is None or (key and root):
        raise VerificationError("Give either --key or --root.", EXIT_USAGE)
    if key and subject is not None:
        raise VerificationError("--subject is of a certificate, and needs --root.", EXIT_USAGE)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror}.", EXIT_USAGE) from error
    if f"-----BEGIN {kind}-----".encode() not in content or b"PRIVATE KEY" in content:
        raise VerificationError(f"{path} is no {kind.lower()} in PEM.", EXIT_USAGE)
    if key and envelope.certificates:
        raise VerificationError(f"{SIGNATURE} was made with a certificate: verify with --root.")
    if root and not envelope.certificates:
        raise VerificationError(f"{SIGNATURE} was made with a key that has no certificate: verify with --key.")


def check_certificates(envelope: Envelope, root: Path, subject: str | None) -> tuple[Certificate, list[bytes]]:
    """Return the signing certificate, and those in ``root`` in DER. Each may do what it is there for.

    No signature is tried.
    """
    try:
        roots = from_pem(root.read_bytes())
    except UnfitCertificate as error:
        raise VerificationError(f"{root} cannot be read: {error}.", EXIT_USAGE) from error
    try:
        return check_chain(envelope.certificates, roots, subject), roots
    except UnfitCertificate as error:
        raise VerificationError(
            f"{SIGNATURE} was made with a certificate that is not for signing releases: {error}."
        ) from error


def files_in(directory: Path) -> dict[str, os.stat_result]:
    """Return every regular file below ``directory`` by its name there; links and what is no file are refused.

    In a snapshot of the hub's cache files are links to where that keeps them, which are followed.
    """
    found: dict[str, os.stat_result] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(directory / folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                name = f"{folder}/{entry.name}" if folder else entry.name
                facts = os.lstat(directory / name)
                if stat.S_ISLNK(facts.st_mode):
                    if not linked_in_cache(directory, name):
                        raise VerificationError(f"{name} is a link; a bundle has real files only.")
                    found[name] = os.stat(directory / name)  # noqa: PTH116
                elif stat.S_ISDIR(facts.st_mode):
                    folders.append(name)
                elif not stat.S_ISREG(facts.st_mode):
                    raise VerificationError(f"{name} is no file.")
                elif facts.st_nlink > 1:
                    raise VerificationError(f"{name} is linked under a second name, by which it could be changed.")
                else:
                    found[name] = facts
    return found


def check_files(directory: Path, signed: dict[str, str], *, hashed: bool = True) -> None:
    """Check that the files of a bundle are those in ``signed``, and model.sig; with ``hashed``, byte for byte."""
    present = files_in(directory)
    for name in sorted(set(signed) - set(present)):
        raise VerificationError(f"{name} is signed and missing.")
    for name in sorted(set(present) - set(signed) - {SIGNATURE}):
        raise VerificationError(f"{name} is not signed.")
    for name, digest in sorted(signed.items()) if hashed else ():
        if sha256(directory / name) != digest:
            raise VerificationError(f"{name} is not what was signed: its sha256 differs.")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_legal_beside(name: str) -> bool:
    """Return whether a file of that name is legal beside those that a manifest lists."""
    folder, _, rest = name.partition("/")
    return name in BESIDE or (folder == ATTESTATIONS and "/" not in rest and rest.endswith(".json"))


def check_manifest(directory: Path, signed: dict[str, str]) -> None:
    """Check that bundle.json lists the signed files, but for those that are legal beside them."""
    table = parse(_signed(directory, MANIFEST, signed), MANIFEST)
    entries = table.get("files") if isinstance(table, dict) else None
    listed: list[str] = []
    for entry in entries if isinstance(entries, list) else [None]:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            raise VerificationError(f"{MANIFEST} does not list the files of a bundle.")
        listed.append(name)
        facts = (signed[name], (directory / name).stat().st_size) if name in signed else None
        if (entry.get("sha256"), entry.get("size")) != facts:
            raise VerificationError(f"{name} is not the file that {MANIFEST} lists.")
    check_names(listed, MANIFEST)
    for name in sorted(name for name in set(signed) - set(listed) if not is_legal_beside(name)):
        raise VerificationError(f"{name} is signed, and {MANIFEST} does not list it.")


def check_release(directory: Path, signed: dict[str, str], newer_than: int | None) -> VerifiedBundle:
    """Return what release.json says; its counter is above ``newer_than``."""
    table = parse(_signed(directory, RELEASE, signed), RELEASE)
    values: list[Any] = [table.get(key) if isinstance(table, dict) else None for key in _RELEASED]
    form, version, digest, counter, target = values
    kind = form, version, type(digest), type(counter), type(target)
    if kind != ("glmexport-release", 1, str, int, str) or not DIGEST.fullmatch(digest) or not 0 <= counter < 1 << 63:
        raise VerificationError(f"{RELEASE} does not describe a release of a version that is known.")
    if newer_than is not None and counter <= newer_than:
        raise VerificationError(
            f"{RELEASE} has the counter {counter}, which is not above {newer_than}: an older release."
        )
    return VerifiedBundle(digest, counter, len(signed), target)


def _signed(directory: Path, name: str, signed: dict[str, str]) -> bytes:
    """Return a file that has to be signed; judged is what was read, whatever happens to the file meanwhile."""
    content = read_file(directory, name)
    if hashlib.sha256(content).hexdigest() != signed.get(name):
        raise VerificationError(f"{name} is not what was signed: its sha256 differs.")
    return content


def check_signature(envelope: Envelope, key: Path | None, root: Path | None, subject: str | None = None) -> None:
    """Check that the payload was signed by the owner of the public ``key``, or by one whom ``root`` vouches for."""
    check_material(envelope, key, root, subject)
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        _check_signature(envelope, key, root, subject, Path(scratch))


def _check_signature(
    envelope: Envelope, key: Path | None, root: Path | None, subject: str | None, scratch: Path
) -> None:
    public, signature, encoded = (scratch / name for name in ("public.pem", "signature", "encoded"))
    if key:
        otherwise = VerificationError(f"{key} is no public key.", EXIT_USAGE)
        shown = _openssl("pkey", "-pubin", "-in", str(key), "-pubout", otherwise=otherwise)
        if envelope.hint is not None and envelope.hint != hashlib.sha256(shown).hexdigest():
            another = VerificationError(f"{SIGNATURE} was made with another key than {key}.")
            # The hint is of a key with both coordinates of its point; a file may have only one, and a sign.
            how = ["ec", "-pubin", "-in", str(key), "-pubout", "-conv_form", "uncompressed"]
            shown = _openssl(*how, otherwise=another)
            if envelope.hint != hashlib.sha256(shown).hexdigest():
                raise another
    else:
        shown = _key_of_chain(envelope, Path(str(root)), subject, scratch)
    public.write_bytes(shown)
    wrong = VerificationError(f"{SIGNATURE} was made with a key of a kind that is not used here.")
    try:
        hashed = hash_of_key(decode_base64(b"".join(shown.split(b"-----")[2].split())))
    except (ValueError, IndexError) as error:
        raise wrong from error
    if hashed is None:
        raise wrong
    broken = VerificationError(f"{SIGNATURE} does not hold: it was made with another key, or was changed.")
    # openssl reads as many bytes as the longest signature of the key has, and overlooks the rest of the file.
    if not is_ecdsa_signature(envelope.signature):
        raise broken
    signature.write_bytes(envelope.signature)
    encoded.write_bytes(
        f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(envelope.payload)} ".encode() + envelope.payload
    )
    _openssl(
        "dgst", f"-{hashed}", "-verify", str(public), "-signature", str(signature), str(encoded), otherwise=broken
    )  # fmt: skip


def _key_of_chain(envelope: Envelope, root: Path, subject: str | None, scratch: Path) -> bytes:
    """Return the public key, PEM, of the signing certificate, which the root vouches for and which may sign."""
    leaf, others, roots, nothing = (scratch / name for name in ("leaf.pem", "others.pem", "roots.pem", "nothing"))
    signer, trusted = check_certificates(envelope, root, subject)
    for path, certificates in (
        (leaf, envelope.certificates[:1]), (others, envelope.certificates[1:]), (roots, trusted)
    ):  # fmt: skip
        path.write_text("".join(to_pem("CERTIFICATE", each) for each in certificates), encoding="ascii")
    nothing.mkdir()
    # No root but the one that was given: not those of the system, which openssl would look for, too.
    chain = ["-untrusted", str(others)] if envelope.certificates[1:] else []
    _openssl(
        "verify", "-attime", str(signer.starts), "-no-CApath", "-CAfile", str(roots), *chain, str(leaf),
        otherwise=VerificationError(f"{SIGNATURE} was made with a certificate that {root} does not vouch for."),
        environment={"SSL_CERT_DIR": str(nothing), "SSL_CERT_FILE": str(nothing / "none")},
    )  # fmt: skip
    return to_pem("PUBLIC KEY", signer.key).encode()


def _openssl(*arguments: str, otherwise: VerificationError, environment: dict[str, str] | None = None) -> bytes:
    """Return what openssl prints; ``otherwise`` is raised where it fails."""
    surrounding = {**os.environ, "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(  # noqa: S603
            ["openssl", *arguments],  # noqa: S607
            env=surrounding, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise VerificationError("openssl is not on this machine, or does not answer.", EXIT_MACHINE) from error
    if done.returncode:
        raise otherwise
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """Verify what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Verify a signed bundle.")
    parser.add_argument("directory", type=Path, help="the bundle")
    with_what = parser.add_mutually_exclusive_group(required=True)
    with_what.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="of the key that signed it")
    with_what.add_argument("--root", type=Path, metavar="CA.pem", help="certificate that vouches for who signed it")
    parser.add_argument("--subject", metavar="NAME", help="with --root: whom the certificate has to be of")
    parser.add_argument("--newer-than", type=int, metavar="COUNTER", help="refuse a release that is not above it")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as stop:
        return EXIT_USAGE if stop.code else 0
    try:
        if not given.directory.is_dir():
            raise VerificationError(f"{given.directory} is no directory.", EXIT_USAGE)
        found = verify(given.directory, given.key, given.root, given.newer_than, given.subject)
    except VerificationError as error:
        sys.stderr.write(f"verify.py: {error}\n")
        return error.code
    except OSError as error:
        sys.stderr.write(f"verify.py: {error.filename or given.directory} cannot be read: {error.strerror}.\n")
        return EXIT_MACHINE
    sys.stderr.write("" if given.json else f"verified: {found.files} files, counter {found.counter}\n")
    sys.stdout.write(json.dumps(found._asdict()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
