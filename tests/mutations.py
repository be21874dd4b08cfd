"""Signed bundles with something changed at random, and both verifiers asked in one process.

Half of what is changed below a signature is signed again by the key that is trusted: what only its owner could write is
then judged, too, and not the signature alone.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from signatures import SCRIPT

from glmexport.foundation.errors import GlmexportError
from glmexport.release.verification import verify

SIGNATURE = "model.sig"
#: By the size of a curve: the order of its group.
ORDERS = {256: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551}
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 7, 7.5, 1e400, float("nan"), 1 << 63, 10**39, 10**41, "", "x", "0" * 64, "sha256",
    "\0", "\ud800", "ü", "u\u0308", "A", "../x", "/etc/passwd", "model.sig", ".git", ".", "weights", [], {}, [[]],
    ["model.sig"], {"sha256": "0" * 64}, [{}], {"": None}, [None, None],
]  # fmt: skip


def script() -> ModuleType:
    """The verifier as it is shipped, to be called."""
    spec = importlib.util.spec_from_file_location("shipped_verifier", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Subject:
    """A small signed bundle, who signed it, and what it is verified with."""

    directory: Path
    private: Path
    key: Path | None = None
    root: Path | None = None

    def __post_init__(self) -> None:
        self.files = {
            path.relative_to(self.directory).as_posix(): path.read_bytes()
            for path in self.directory.rglob("*")
            if path.is_file()
        }
        self._signer: Any = load_pem_private_key(self.private.read_bytes(), None)
        self._script = script()

    def signature(self, payload: bytes) -> bytes:
        """Of a DSSE envelope with that payload."""
        encoded = f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode() + payload
        digest = {256: hashes.SHA256(), 384: hashes.SHA384()}[self._signer.key_size]
        made: bytes = self._signer.sign(encoded, ec.ECDSA(digest))
        return made

    def signed_again(self, files: dict[str, bytes]) -> None:
        """What is in ``files`` now, whatever it is, under the signature of the key that is trusted."""
        table = json.loads(files[SIGNATURE])
        payload = json.loads(base64.b64decode(table["dsseEnvelope"]["payload"]))
        resources = [
            {"name": name, "algorithm": "sha256", "digest": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(files.items())
            if name != SIGNATURE
        ]
        payload["predicate"]["resources"] = resources
        whole = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources))
        payload["subject"][0]["digest"]["sha256"] = whole.hexdigest()
        self.put(files, table, json.dumps(payload).encode())

    def put(self, files: dict[str, bytes], table: dict[str, Any], payload: bytes, *, signed: bool = True) -> None:
        """Write a payload, with a signature of it or with the former one."""
        envelope = table["dsseEnvelope"]
        envelope["payload"] = encoded(payload)
        if signed:
            envelope["signatures"][0]["sig"] = encoded(self.signature(payload))
        files[SIGNATURE] = json.dumps(table).encode()

    def judged(self, files: dict[str, bytes], finish: Callable[[Path], None]) -> tuple[object, object]:
        """What the package and the script say of a bundle that consists of ``files``: a code, or what is verified."""
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        finish(self.directory)
        try:
            package: object = verify(self.directory, self.key, root=self.root)._asdict()
        except GlmexportError as error:
            package = error.exit_code
        try:
            alone: object = self._script.verify(self.directory, self.key, self.root, None)._asdict()
        except self._script.VerificationError as error:
            alone = error.code
        except OSError:
            alone = 69
        return package, alone


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def changed_bytes(chance: Random, content: bytes) -> bytes:
    """A byte flipped, put in, taken out or put behind; or the end cut off."""
    at = chance.randrange(len(content) + 1)
    more = bytes([chance.randrange(256)])
    return chance.choice(
        [
            content[:at] + bytes([content[at % len(content)] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
            if content
            else more,
            content[:at] + more + content[at:],
            content[:at] + content[at + 1 :],
            content[:at],
            content + more,
            content + content[-1:],
            content + b"\n",
        ]
    )


def changed_text(chance: Random, text: str) -> str:
    """Another spelling, or another text."""
    at = chance.randrange(len(text) + 1)
    return chance.choice(
        [
            text.upper(), text.swapcase(), text + " ", " " + text, text + "\n", text + "=", text.rstrip("="),
            text + "\0", text.replace("+", "-").replace("/", "_"), text[:at] + "\n" + text[at:],
            text[:at] + text[at + 1 :], text[:at] + "é" + text[at:], text[:at] + "\ud800" + text[at:], text + text,
            "./" + text, text + "/", text[:at], text[:-3] + "B==" if text.endswith("A==") else text[:-2] + "x=",
            "Ａ" + text, text[::-1],
        ]
    )  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Everything in a document that can be replaced: what it is in, and its key or index there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, below in list(inside):
        found += [(value, key), *places(below)]
    return found


def changed_json(chance: Random, value: Any) -> Any:
    """One thing in a document is another, missing, there twice, moved or of another type."""
    value = json.loads(json.dumps(value))
    found = places(value)
    if not found or chance.random() < 0.02:
        return chance.choice(STRANGE)
    inside, key = chance.choice(found)
    present = inside[key]
    kind = chance.randrange(8)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(present, str):
        inside[key] = changed_text(chance, present)
    elif kind == 2 and isinstance(inside, list):
        inside.insert(chance.randrange(len(inside) + 1), json.loads(json.dumps(present)))
    elif kind == 3 and isinstance(inside, list):
        chance.shuffle(inside)
    elif kind == 4 and isinstance(inside, dict):
        inside[changed_text(chance, str(key))] = inside.pop(key) if chance.random() < 0.5 else present
    elif kind == 5:
        inside[key] = chance.choice([[present], {"x": present}, str(present), None])
    elif kind == 6:
        other, elsewhere = chance.choice(found)
        inside[key] = json.loads(json.dumps(other[elsewhere]))
    else:
        inside[key] = chance.choice(STRANGE)
    return value


def written(chance: Random, value: Any) -> bytes:
    """A document in one of the ways in which JSON can be written, or nearly so."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.8, indent=chance.choice([None, None, 1]))
    if chance.random() < 0.1 and isinstance(value, dict) and value:
        name = chance.choice(sorted(value))
        text = text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(chance.choice([value[name], None]))}}}"
    if chance.random() < 0.05:
        text = chance.choice(["\ufeff" + text, text + "\n", text + "\0", text + "{}", "\n" + text, text[:-1]])
    form = "utf-16" if chance.random() < 0.01 else "utf-8"
    return text.encode(form, "surrogatepass")


def change_envelope(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """What the signature's document is like, signed as before."""
    table = json.loads(files[SIGNATURE])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        table = changed_json(chance, table)
    files[SIGNATURE] = written(chance, table)


def change_material(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """Who is said to have signed."""
    table = json.loads(files[SIGNATURE])
    material = table["verificationMaterial"]
    hint = chance.choice([*STRANGE, "0" * 64])
    chain = material.get("x509CertificateChain", {"certificates": [{"rawBytes": encoded(b"0")}]})
    parts: list[dict[str, Any]] = [
        {"publicKey": {"hint": hint}}, {"publicKey": {}}, {"x509CertificateChain": chain}, {"publicKey": hint},
        {"x509CertificateChain": {"certificates": []}}, {"x509CertificateChain": hint}, {"tlogEntries": hint},
        {"certificate": chain["certificates"][0]}, {"timestampVerificationData": hint}, {},
    ]  # fmt: skip
    for _ in range(chance.choice([1, 2])):
        material |= chance.choice(parts)
    if chance.random() < 0.3:
        table["dsseEnvelope"]["signatures"][0]["keyid"] = chance.choice(STRANGE)
    files[SIGNATURE] = written(chance, table)


def change_certificates(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """The chain: bytes of a certificate, their order, one too many or too few."""
    table = json.loads(files[SIGNATURE])
    chain = table["verificationMaterial"].get("x509CertificateChain", {}).get("certificates", [])
    if not chain:
        change_envelope(chance, subject, files)
        return
    index = chance.randrange(len(chain))
    der = base64.b64decode(chain[index]["rawBytes"])
    kind = chance.randrange(6)
    if kind < 3:
        chain[index]["rawBytes"] = encoded(changed_bytes(chance, der))
    elif kind == 3:
        chance.shuffle(chain)
    elif kind == 4:
        chain.insert(chance.randrange(len(chain) + 1), chain[index])
    else:
        del chain[index]
    files[SIGNATURE] = json.dumps(table).encode()


def change_signature(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """The signature itself: its other half, which holds as well, its bytes, or how they are written."""
    table = json.loads(files[SIGNATURE])
    place = table["dsseEnvelope"]["signatures"][0]
    content = base64.b64decode(place["sig"])
    first, second = decode_dss_signature(content)
    order = ORDERS.get(subject._signer.key_size, 1 << 384)
    content = chance.choice(
        [
            encode_dss_signature(first, order - second), changed_bytes(chance, content), b"", content + b"\0",
            b"0\x81" + content[1:], content[:2] + b"\x02\x00" + content[2:], encode_dss_signature(second, first),
        ]
    )  # fmt: skip
    place["sig"] = chance.choice([encoded, encoded, lambda each: changed_text(chance, encoded(each))])(content)
    files[SIGNATURE] = written(chance, table)


def change_payload(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """What is signed, mostly signed again."""
    table = json.loads(files[SIGNATURE])
    payload = base64.b64decode(table["dsseEnvelope"]["payload"])
    if chance.random() < 0.2:
        payload = changed_bytes(chance, payload)
    else:
        document = json.loads(payload)
        if chance.random() < 0.4:
            document["predicate"]["serialization"] = changed_json(chance, document["predicate"]["serialization"])
        else:
            document = changed_json(chance, document)
        payload = written(chance, document)
    subject.put(files, table, payload, signed=chance.random() < 0.8)


def change_document(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """The manifest or the release, mostly signed again."""
    name = chance.choice(["bundle.json", "release.json"])
    if chance.random() < 0.2:
        files[name] = changed_bytes(chance, files[name])
    else:
        files[name] = written(chance, changed_json(chance, json.loads(files[name])))
    if chance.random() < 0.8:
        subject.signed_again(files)


def change_files(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """Files: another byte, another name, one more or less; at times signed again."""
    name = chance.choice(sorted(set(files) - {SIGNATURE}))
    others = ["more", "weights/more", ".git/x", ".gitignore", "attestations/x.json", "report.json", name + "x", "ü"]
    kind = chance.randrange(5)
    if kind < 2:
        files[name] = changed_bytes(chance, files[name])
    elif kind == 2:
        del files[name]
    elif kind == 3:
        files[chance.choice([each for each in others if each not in files])] = files.pop(name)
    else:
        files.setdefault(chance.choice(others), b"x")
    if chance.random() < 0.4:
        subject.signed_again(files)


def change_raw(chance: Random, subject: Subject, files: dict[str, bytes]) -> None:
    """Any byte of the signature's file."""
    files[SIGNATURE] = changed_bytes(chance, files[SIGNATURE])


CHANGES = (
    change_envelope, change_material, change_certificates, change_signature, change_payload, change_payload,
    change_document, change_files, change_raw,
)  # fmt: skip


def finish(chance: Random) -> Callable[[Path], None]:
    """Now and then something that is no file."""

    def nothing(_: Path) -> None:
        return

    def empty_folder(directory: Path) -> None:
        (directory / "empty").mkdir(exist_ok=True)

    def a_link(directory: Path) -> None:
        path = directory / "release.json"
        if path.is_file():
            path.unlink()
            path.symlink_to(directory / "bundle.json")

    def a_pipe(directory: Path) -> None:
        os.mkfifo(directory / "pipe")

    return chance.choice([nothing] * 17 + [empty_folder, a_link, a_pipe])


def both_say(chance: Random, subject: Subject) -> tuple[str, object, object]:
    """The kind of a change at random, and what the package and the script say of the bundle after it."""
    files = dict(subject.files)
    change = chance.choice(CHANGES)
    change(chance, subject, files)
    return change.__name__, *subject.judged(files, finish(chance))
