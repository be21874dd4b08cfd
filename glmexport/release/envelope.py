"""A reader of model.sig that trusts nothing: who is said to have signed, and which files.

There is one way to write it, that of model-signing: whatever else somebody could read in another way is refused.
Standard library of Python 3.9: this is a part of verify.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category, normalize

from glmexport.release.encodings import decode_base64

SIGNATURE = "model.sig"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
EXIT_USAGE, EXIT_REFUSED, EXIT_MACHINE = 64, 65, 69
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
#: Files that model-signing overlooks in every bundle, so that they cannot be signed.
_OVERLOOKED = (".git", ".gitattributes", ".github", ".gitignore")
#: Limits: bytes of the signature and of other documents; values in a document, a hundred bytes of memory each; digits.
_LONGEST_SIGNATURE, _LONGEST_JSON = 1 << 24, 1 << 26
_MOST_VALUES, _MOST_DIGITS = 1 << 21, 40


class VerificationError(Exception):
    """A bundle is not as it was signed.

    The text names the file. Other exit codes: an argument or openssl is unusable.
    """

    def __init__(self, message: str, code: int = EXIT_REFUSED) -> None:
        super().__init__(message)
        self.code = code


class Envelope(NamedTuple):
    """The content of model.sig, not verified yet: certificates in DER, the signing one first, or the hash of a key."""

    payload: bytes
    signature: bytes
    certificates: tuple[bytes, ...]
    hint: str | None


def parse(content: bytes, name: str) -> Any:
    """Parse JSON in which no key comes twice, and which fits into little memory."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key comes twice")
        return table

    def whole(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError("a number is too long")
        return int(digits)

    try:
        if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_VALUES:
            raise ValueError("it has too many values")
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_int=whole)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise VerificationError(f"{name} cannot be read: {why}.") from error


def is_legal_name(name: str) -> bool:
    """Return whether a bundle may have a file of that name: inside it, in the plainest form, on every file system."""
    strange = any(each in "\\:" or category(each) in ("Cc", "Cs") for each in name)
    return not strange and len(name) <= 1024 and not {"", ".", ".."} & set(name.split("/"))


def check_names(names: list[str], where: str) -> None:
    """Check that names are legal, and no two are one name, or one a folder of the other, without regard to case."""
    seen: dict[str, str] = {}
    for name in names:
        if not is_legal_name(name):
            raise VerificationError(f"{where} names {name!r}, which may leave the bundle.")
        # Names that are one on some file system are equal so.
        key = normalize("NFC", normalize("NFC", name).casefold())
        if key in seen:
            raise VerificationError(
                f"{where} names {name!r} beside {seen[key]!r}: some file systems cannot tell them apart."
            )
        seen[key] = name
    for key, name in seen.items():
        if any(key[:end] in seen for end, character in enumerate(key) if character == "/"):
            raise VerificationError(f"{where} names a file and the same as the folder of {name!r}.")


def read_envelope(directory: Path) -> Envelope:
    """Return the envelope in model.sig; nothing is verified yet."""
    parsed = parse(read_file(directory, SIGNATURE), SIGNATURE)
    bundle = _table(parsed, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    material = _table(bundle["verificationMaterial"], set(), {"publicKey", "x509CertificateChain", "tlogEntries"})
    envelope = _table(bundle["dsseEnvelope"], {"payload", "payloadType", "signatures"})
    signatures = _list(envelope["signatures"])
    kind = bundle["mediaType"], envelope["payloadType"], len(signatures), material.get("tlogEntries", [])
    if kind != (_MEDIA_TYPE, PAYLOAD_TYPE, 1, []):
        raise VerificationError(f"{SIGNATURE} is not one signature of a statement, without a public log.")
    hint = _table(material.get("publicKey", {}), set(), {"hint"}).get("hint")
    chain = _table(material.get("x509CertificateChain", {"certificates": []}), {"certificates"})["certificates"]
    certificates = tuple(_decoded(_table(each, {"rawBytes"})["rawBytes"]) for each in _list(chain))
    both = {"publicKey", "x509CertificateChain"} <= set(material)
    if both or ("publicKey" in material) == bool(certificates) or not (hint is None or _is_text(hint)):
        raise VerificationError(f"{SIGNATURE} has to name either a key or a chain of certificates.")
    signed = _table(signatures[0], {"sig"}, {"keyid"})
    if not _is_text(signed.get("keyid", "")):
        raise VerificationError(f"{SIGNATURE} names its key by something else than a text.")
    return Envelope(_decoded(envelope["payload"]), _decoded(signed["sig"]), certificates, hint or None)


def signed_files(payload: bytes) -> dict[str, str]:
    """Return the SHA-256 by name of every signed file, from a statement whose signature holds."""
    statement = _table(parse(payload, SIGNATURE), {"_type", "subject", "predicateType", "predicate"})
    predicate = _table(statement["predicate"], {"resources", "serialization"})
    method = _table(predicate["serialization"], {"method", "hash_type", "allow_symlinks"}, {"ignore_paths"})
    kind = statement["_type"], statement["predicateType"], method["method"], method["hash_type"]
    if kind != (_STATEMENT_TYPE, _PREDICATE_TYPE, "files", "sha256") or not isinstance(method["allow_symlinks"], bool):
        raise VerificationError(f"{SIGNATURE} does not state the sha256 of the files of a model.")
    files: dict[str, str] = {}
    whole = hashlib.sha256()
    resources = [_table(each, {"name", "algorithm", "digest"}) for each in _list(predicate["resources"])]
    for each in resources:
        texts = all(isinstance(value, str) for value in each.values())
        if not texts or each["algorithm"] != "sha256" or not DIGEST.fullmatch("sha256:" + each["digest"]):
            raise VerificationError(f"{SIGNATURE} has no sha256 for {each['name']!r}.")
        files[each["name"]] = each["digest"]
        whole.update(bytes.fromhex(each["digest"]))
    check_names([each["name"] for each in resources], SIGNATURE)
    _check_overlooked(_list(method.get("ignore_paths")), files)
    subjects = [_table(each, {"name", "digest"}) for each in _list(statement["subject"])]
    if [each["digest"] for each in subjects] != [{"sha256": whole.hexdigest()}] or not _is_text(subjects[0]["name"]):
        raise VerificationError(f"{SIGNATURE} contradicts itself: its subject is not what it lists.")
    return files


def _check_overlooked(paths: list[Any], files: dict[str, str]) -> None:
    """Require that a signature overlooks itself, and nothing that it lists: by model-signing it could not hold."""
    if SIGNATURE not in paths or not all(isinstance(path, str) and is_legal_name(path) for path in paths):
        raise VerificationError(f"{SIGNATURE} does not say that it overlooks itself, and names of files alone.")
    for name in files:
        above = {name, *(name[:end] for end, character in enumerate(name) if character == "/")}
        if above & {*paths, *_OVERLOOKED}:
            raise VerificationError(f"{SIGNATURE} lists {name!r}, which it says to overlook, or which belongs to git.")


def linked_in_cache(directory: Path, name: str) -> bool:
    """Return whether the link ``name`` in a snapshot of the hub's cache leads to where that keeps its files."""
    snapshots = Path(os.path.realpath(directory)).parent
    repository = snapshots.parent
    target = os.path.realpath(directory / name)
    places = [f"{place}{os.sep}" for place in (repository / "blobs", repository.parent / "blobs")]
    in_cache = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return in_cache and Path(target).is_file() and target.startswith(tuple(places))


def read_file(directory: Path, name: str) -> bytes:
    """Read a document of a bundle.

    Raises:
        VerificationError: it is missing, a link to elsewhere, or longer than any is.
    """
    path, longest = directory / name, _LONGEST_SIGNATURE if name == SIGNATURE else _LONGEST_JSON
    content = b""
    if path.is_file() and (not path.is_symlink() or linked_in_cache(directory, name)):
        with path.open("rb") as file:
            content = file.read(longest + 1)
    if not 0 < len(content) <= longest:
        raise VerificationError(f"{name} is missing, empty, no real file or too long.")
    return content


def _table(value: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """Return a table of the signature with these keys only: a second spelling of one could be read differently."""
    if not isinstance(value, dict) or not required <= set(value) <= required | optional:
        raise VerificationError(f"{SIGNATURE} is damaged: a part of it does not have the keys that it has to have.")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_text(value: Any) -> bool:
    """Return whether it is text that can be written: JSON can have half of a character."""
    return isinstance(value, str) and not any(category(each) == "Cs" for each in value)


def _decoded(value: Any) -> bytes:
    """Return the bytes that a text of the signature has in base64."""
    try:
        if not isinstance(value, str) or not value.isascii():
            raise ValueError("no base64")
        return decode_base64(value.encode("ascii"))
    except ValueError as error:
        raise VerificationError(f"{SIGNATURE} is damaged: a part of it is {error}.") from error
