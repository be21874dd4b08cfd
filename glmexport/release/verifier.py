#!/usr/bin/env python3
"""Verify a signed bundle with Python and openssl alone: every byte of it is what was signed, and nothing else is there.

    python3 verify.py DIRECTORY --key PUBLIC.pem | --root CA.pem [--newer-than COUNTER] [--json]

Needs Python 3.9 or later and the program openssl (1.1.1 or later); no package, no network. It is shipped in each
signed bundle, but take it from where you trust: one that came with a bundle could have been changed with it.

The signature is that of OpenSSF Model Signing (model.sig: a sigstore bundle, in it a DSSE envelope, in it an in-toto
statement with the SHA-256 of every file). A chain of certificates is judged at the time at which the signing
certificate became valid, since the signature carries no time of its own.

Exit codes: 0 verified, 64 unusable arguments, 65 not what was signed, 69 openssl or the disk failed.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import os
import re
import ssl
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category, normalize

SIGNATURE, MANIFEST, RELEASE, ATTESTATIONS = "model.sig", "bundle.json", "release.json", "attestations"
#: What may be in a bundle beside the files that its manifest lists, as well as ``attestations/NAME.json``.
BESIDE = frozenset(
    {SIGNATURE, MANIFEST, RELEASE, "golden.json", "verify.py", "report.json", "report.html", "report.md", "report.xml"}
)
#: By the name that openssl has for a curve: the hash that is signed.
CURVES = {"prime256v1": "sha256", "secp384r1": "sha384", "secp521r1": "sha512"}
EXIT_USAGE, EXIT_REFUSED, EXIT_MACHINE = 64, 65, 69
_PAYLOAD_TYPE, _MEDIA_TYPE = "application/vnd.in-toto+json", "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_RELEASED = ("format", "version", "bundle", "counter", "target")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST_JSON = 256 << 20


class Refused(Exception):
    """What is not as it was signed, naming the file; with another exit code, an argument or openssl is unusable."""

    def __init__(self, message: str, code: int = EXIT_REFUSED) -> None:
        super().__init__(message)
        self.code = code


class Verified(NamedTuple):
    """What holds: digest of the bundle, counter of its release, number of signed files, name of its target."""

    digest: str
    counter: int
    files: int
    target: str


class Envelope(NamedTuple):
    """What model.sig has, not verified yet: certificates in DER, the signing one first, or the hash of a key."""

    payload: bytes
    signature: bytes
    certificates: tuple[bytes, ...]
    hint: str | None


def verify(directory: Path, key: Path | None, root: Path | None, newer_than: int | None) -> Verified:
    """Verify all that there is to verify; raises Refused."""
    directory = Path(os.path.realpath(directory))
    envelope = read_envelope(directory)
    check_signature(envelope, key, root)
    signed = signed_files(envelope.payload)
    check_files(directory, signed)
    check_manifest(directory, signed)
    return check_release(directory, signed, newer_than)


def parse(content: bytes, name: str) -> Any:
    """JSON in which no key comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key comes twice")
        return table

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refused(f"{name} cannot be read: {why}.") from error


def legal(name: str) -> bool:
    """Whether a file in a bundle can be called so: inside it, in the plainest form, and on every file system."""
    strange = any(each in "\\:" or category(each) in ("Cc", "Cs") for each in name)
    return not strange and len(name) <= 1024 and not {"", ".", ".."} & set(name.split("/"))


def check_names(names: list[str], where: str) -> None:
    """Each is legal, and no two are one name, or one a folder of the other, where case does not count."""
    seen: dict[str, str] = {}
    for name in names:
        if not legal(name):
            raise Refused(f"{where} names {name!r}, which may leave the bundle.")
        # Names that are one on some file system are equal so.
        key = normalize("NFC", normalize("NFC", name).casefold())
        if key in seen:
            raise Refused(f"{where} names {name!r} beside {seen[key]!r}: some file systems cannot tell them apart.")
        seen[key] = name
    for key, name in seen.items():
        if any(key[:end] in seen for end, character in enumerate(key) if character == "/"):
            raise Refused(f"{where} names a file and the same as the folder of {name!r}.")


def read_envelope(directory: Path) -> Envelope:
    """The envelope in model.sig; nothing is verified yet."""
    parsed = parse(_read(directory, SIGNATURE), SIGNATURE)
    bundle = _table(parsed, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    material = _table(bundle["verificationMaterial"], set(), {"publicKey", "x509CertificateChain", "tlogEntries"})
    envelope = _table(bundle["dsseEnvelope"], {"payload", "payloadType", "signatures"})
    signatures = _list(envelope["signatures"])
    kind = bundle["mediaType"], envelope["payloadType"], len(signatures), material.get("tlogEntries", [])
    if kind != (_MEDIA_TYPE, _PAYLOAD_TYPE, 1, []):
        raise Refused(f"{SIGNATURE} is not one signature of a statement, without a public log.")
    hint = _table(material.get("publicKey", {}), set(), {"hint"}).get("hint")
    chain = _table(material.get("x509CertificateChain", {"certificates": []}), {"certificates"})["certificates"]
    certificates = tuple(_decoded(_table(each, {"rawBytes"})["rawBytes"]) for each in _list(chain))
    if ("publicKey" in material) == bool(certificates) or not isinstance(hint, (str, type(None))):
        raise Refused(f"{SIGNATURE} has to name either a key or a chain of certificates.")
    signature = _decoded(_table(signatures[0], {"sig"}, {"keyid"})["sig"])
    return Envelope(_decoded(envelope["payload"]), signature, certificates, hint or None)


def check_material(envelope: Envelope, key: Path | None, root: Path | None) -> None:
    """What was given to verify with is there, and of the kind that signed."""
    path, kind = (key, "PUBLIC KEY") if key else (root, "CERTIFICATE")
    if path is None or (key and root):
        raise Refused("Give either --key or --root.", EXIT_USAGE)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.", EXIT_USAGE) from error
    if f"-----BEGIN {kind}-----".encode() not in content or b"PRIVATE KEY" in content:
        raise Refused(f"{path} is no {kind.lower()} in PEM.", EXIT_USAGE)
    if key and envelope.certificates:
        raise Refused(f"{SIGNATURE} was made with a certificate: verify with --root.")
    if root and not envelope.certificates:
        raise Refused(f"{SIGNATURE} was made with a key that has no certificate: verify with --key.")


def signed_files(payload: bytes) -> dict[str, str]:
    """SHA-256 by name of every signed file, in a statement whose signature holds."""
    statement = _table(parse(payload, SIGNATURE), {"_type", "subject", "predicateType", "predicate"})
    predicate = _table(statement["predicate"], {"resources", "serialization"})
    method = predicate["serialization"] if isinstance(predicate["serialization"], dict) else {}
    kind = statement["_type"], statement["predicateType"], method.get("method"), method.get("hash_type")
    if kind != (_STATEMENT_TYPE, _PREDICATE_TYPE, "files", "sha256"):
        raise Refused(f"{SIGNATURE} does not state the sha256 of the files of a model.")
    files: dict[str, str] = {}
    whole = hashlib.sha256()
    resources = [_table(each, {"name", "algorithm", "digest"}) for each in _list(predicate["resources"])]
    for each in resources:
        texts = all(isinstance(value, str) for value in each.values())
        if not texts or each["algorithm"] != "sha256" or not _DIGEST.fullmatch("sha256:" + each["digest"]):
            raise Refused(f"{SIGNATURE} has no sha256 for {each['name']!r}.")
        files[each["name"]] = each["digest"]
        whole.update(bytes.fromhex(each["digest"]))
    check_names([each["name"] for each in resources], SIGNATURE)
    subjects = _list(statement["subject"])
    digest = subjects[0].get("digest") if len(subjects) == 1 and isinstance(subjects[0], dict) else None
    if digest != {"sha256": whole.hexdigest()}:
        raise Refused(f"{SIGNATURE} contradicts itself: its subject is not what it lists.")
    return files


def files_in(directory: Path) -> dict[str, os.stat_result]:
    """Every regular file below ``directory`` by its name there; links and what is no file are refused."""
    found: dict[str, os.stat_result] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(directory / folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                name = f"{folder}/{entry.name}" if folder else entry.name
                facts = os.lstat(directory / name)
                if stat.S_ISLNK(facts.st_mode):
                    raise Refused(f"{name} is a link; a bundle has real files only.")
                if stat.S_ISDIR(facts.st_mode):
                    folders.append(name)
                elif not stat.S_ISREG(facts.st_mode):
                    raise Refused(f"{name} is no file.")
                elif facts.st_nlink > 1:
                    raise Refused(f"{name} is linked under a second name, by which it could be changed.")
                else:
                    found[name] = facts
    return found


def check_files(directory: Path, signed: dict[str, str], *, hashed: bool = True) -> None:
    """The files of a bundle are those in ``signed``, and model.sig; with ``hashed``, byte for byte."""
    present = files_in(directory)
    for name in sorted(set(signed) - set(present)):
        raise Refused(f"{name} is signed and missing.")
    for name in sorted(set(present) - set(signed) - {SIGNATURE}):
        raise Refused(f"{name} is not signed.")
    for name, digest in sorted(signed.items()) if hashed else ():
        if sha256(directory / name) != digest:
            raise Refused(f"{name} is not what was signed: its sha256 differs.")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def beside(name: str) -> bool:
    """Whether a file of that name is legal beside those that a manifest lists."""
    folder, _, rest = name.partition("/")
    return name in BESIDE or (folder == ATTESTATIONS and "/" not in rest and rest.endswith(".json"))


def check_manifest(directory: Path, signed: dict[str, str]) -> None:
    """bundle.json lists the signed files, but for those that are legal beside them."""
    table = parse(_signed(directory, MANIFEST, signed), MANIFEST)
    entries = table.get("files") if isinstance(table, dict) else None
    listed: list[str] = []
    for entry in entries if isinstance(entries, list) else [None]:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            raise Refused(f"{MANIFEST} does not list the files of a bundle.")
        listed.append(name)
        facts = (signed[name], (directory / name).stat().st_size) if name in signed else None
        if (entry.get("sha256"), entry.get("size")) != facts:
            raise Refused(f"{name} is not the file that {MANIFEST} lists.")
    check_names(listed, MANIFEST)
    for name in sorted(name for name in set(signed) - set(listed) if not beside(name)):
        raise Refused(f"{name} is signed, and {MANIFEST} does not list it.")


def check_release(directory: Path, signed: dict[str, str], newer_than: int | None) -> Verified:
    """What release.json says; its counter is above ``newer_than``."""
    table = parse(_signed(directory, RELEASE, signed), RELEASE)
    values: list[Any] = [table.get(key) if isinstance(table, dict) else None for key in _RELEASED]
    form, version, digest, counter, target = values
    kind = form, version, type(digest), type(counter), type(target)
    if kind != ("glmexport-release", 1, str, int, str) or not _DIGEST.fullmatch(digest) or not 0 <= counter < 1 << 63:
        raise Refused(f"{RELEASE} does not describe a release of a version that is known.")
    if newer_than is not None and counter <= newer_than:
        raise Refused(f"{RELEASE} has the counter {counter}, which is not above {newer_than}: an older release.")
    return Verified(digest, counter, len(signed), target)


def _signed(directory: Path, name: str, signed: dict[str, str]) -> bytes:
    """Content of a file that has to be signed; judged is what was read, whatever happens to the file meanwhile."""
    content = _read(directory, name)
    if hashlib.sha256(content).hexdigest() != signed.get(name):
        raise Refused(f"{name} is not what was signed: its sha256 differs.")
    return content


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LONGEST_JSON:
        raise Refused(f"{name} is missing, no real file or too long.")
    return path.read_bytes()


def _table(value: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """A table of the signature with these keys only: a second spelling of one could be read by somebody else."""
    if not isinstance(value, dict) or not required <= set(value) <= required | optional:
        raise Refused(f"{SIGNATURE} is damaged: a part of it does not have the keys that it has to have.")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(value.encode("ascii"), validate=True)
    except (AttributeError, UnicodeEncodeError, binascii.Error) as error:
        raise Refused(f"{SIGNATURE} is damaged: a part of it is no base64.") from error


def check_signature(envelope: Envelope, key: Path | None, root: Path | None) -> None:
    """Who has signed the payload is the owner of the public ``key``, or somebody whom ``root`` vouches for."""
    check_material(envelope, key, root)
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        _check_signature(envelope, key, root, Path(scratch))


def _check_signature(envelope: Envelope, key: Path | None, root: Path | None, scratch: Path) -> None:
    public, signature, encoded = (scratch / name for name in ("public.pem", "signature", "encoded"))
    if key:
        otherwise = Refused(f"{key} is no public key.", EXIT_USAGE)
        shown = _openssl("pkey", "-pubin", "-in", str(key), "-pubout", otherwise=otherwise)
        if envelope.hint is not None and envelope.hint != hashlib.sha256(shown).hexdigest():
            raise Refused(f"{SIGNATURE} was made with another key than {key}.")
    else:
        shown = _key_of_chain(envelope.certificates, Path(str(root)), scratch)
    public.write_bytes(shown)
    wrong = Refused(f"{SIGNATURE} was made with a key of a kind that is not used here.")
    facts = _openssl("pkey", "-pubin", "-in", str(public), "-noout", "-text_pub", otherwise=wrong)
    curve = re.search(rb"^ASN1 OID: (\S+)$", facts, re.MULTILINE)
    if curve is None or curve[1].decode() not in CURVES:
        raise wrong
    signature.write_bytes(envelope.signature)
    encoded.write_bytes(
        f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(envelope.payload)} ".encode() + envelope.payload
    )
    how = ["dgst", f"-{CURVES[curve[1].decode()]}", "-verify", str(public), "-signature", str(signature), str(encoded)]
    _openssl(*how, otherwise=Refused(f"{SIGNATURE} does not hold: it was made with another key, or was changed."))


def _key_of_chain(certificates: tuple[bytes, ...], root: Path, scratch: Path) -> bytes:
    """Public key of the signing certificate, which the root vouches for and which may sign."""
    leaf, others, nothing = (scratch / name for name in ("leaf.pem", "others.pem", "nothing"))
    pem = [ssl.DER_cert_to_PEM_cert(each) for each in certificates]
    leaf.write_text(pem[0], encoding="ascii")
    others.write_text("".join(pem[1:]), encoding="ascii")
    nothing.mkdir()
    damaged = Refused(f"{SIGNATURE} has a damaged certificate.")
    start = _openssl("x509", "-in", str(leaf), "-noout", "-startdate", otherwise=damaged)
    try:
        at = int(ssl.cert_time_to_seconds(start.decode().strip().partition("=")[2]))
    except ValueError as error:
        raise damaged from error
    # No root but the one that was given: not those of the system, which openssl would look for, too.
    chain = ["-untrusted", str(others)] if pem[1:] else []
    _openssl(
        "verify", "-attime", str(at), "-no-CApath", "-CAfile", str(root), *chain, str(leaf),
        otherwise=Refused(f"{SIGNATURE} was made with a certificate that {root} does not vouch for."),
        environment={"SSL_CERT_DIR": str(nothing), "SSL_CERT_FILE": str(nothing / "none")},
    )  # fmt: skip
    uses = _openssl("x509", "-in", str(leaf), "-noout", "-ext", "keyUsage,extendedKeyUsage", otherwise=damaged).decode()
    if "Digital Signature" not in uses and "Code Signing" not in uses:
        raise Refused(f"{SIGNATURE} was made with a certificate that is not for signing.")
    return _openssl("x509", "-in", str(leaf), "-noout", "-pubkey", otherwise=damaged)


def _openssl(*arguments: str, otherwise: Refused, environment: dict[str, str] | None = None) -> bytes:
    """What openssl prints; ``otherwise`` is raised where it fails."""
    surrounding = {**os.environ, "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(  # noqa: S603
            ["openssl", *arguments],  # noqa: S607
            env=surrounding, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Refused("openssl is not on this machine, or does not answer.", EXIT_MACHINE) from error
    if done.returncode:
        raise otherwise
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """Verify what the command line names; the exit code."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Verify a signed bundle.")
    parser.add_argument("directory", type=Path, help="the bundle")
    with_what = parser.add_mutually_exclusive_group(required=True)
    with_what.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="of the key that signed it")
    with_what.add_argument("--root", type=Path, metavar="CA.pem", help="certificate that vouches for who signed it")
    parser.add_argument("--newer-than", type=int, metavar="COUNTER", help="refuse a release that is not above it")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as stop:
        return EXIT_USAGE if stop.code else 0
    try:
        if not given.directory.is_dir():
            raise Refused(f"{given.directory} is no directory.", EXIT_USAGE)
        found = verify(given.directory, given.key, given.root, given.newer_than)
    except Refused as error:
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
