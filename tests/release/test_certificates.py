"""Which certificates may sign a release, and which may vouch for one that does: both verifiers say the same."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st
from model_signing.signing import Config
from signatures import AUTHORITY, SIGNING, Judge, certify, tree

from glmexport.foundation.errors import EXIT_INPUT, EXIT_UNVERIFIED, InputError
from glmexport.release.certificates import UnfitCertificate, from_pem, read
from glmexport.release.keys import KeyFiles, Signatory, open_signatory

CODE, SERVER, CLIENT, MAIL, ANY = (
    ExtendedKeyUsageOID.CODE_SIGNING,
    ExtendedKeyUsageOID.SERVER_AUTH,
    ExtendedKeyUsageOID.CLIENT_AUTH,
    ExtendedKeyUsageOID.EMAIL_PROTECTION,
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
)
USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@cache
def private(kind: str) -> Any:
    """A private key of some kind."""
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    curves = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p224": ec.SECP224R1(), "k256": ec.SECP256K1()}
    return ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(curves[kind])


@dataclass(frozen=True)
class Wanted:
    """What one certificate of a chain is like."""

    name: str
    authority: bool | None
    usages: tuple[str, ...] | None
    extended: tuple[x509.ObjectIdentifier, ...] | None = None
    key: str = "p256"
    #: Of the signature upon it.
    hashed: str = "sha256"
    pss: bool = False
    below: int | None = None
    alternatives: tuple[x509.GeneralName, ...] = ()
    more: tuple[x509.ExtensionType, ...] = ()

    def made(self, issuer: Wanted, directory: Path, file: str = "") -> Path:
        """The certificate in a file, with its key beside it."""
        now = datetime.now(UTC)
        keys = private(self.key), private(issuer.key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject(self.name))
            .issuer_name(subject(issuer.name))
            .public_key(keys[0].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
        )
        if self.authority is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.authority, self.below), critical=True)
        if self.usages is not None:
            given = {name: name in self.usages for name in USAGES}
            builder = builder.add_extension(x509.KeyUsage(**given), critical=True)
        if self.extended is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.extended), critical=False)
        if self.alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.alternatives), critical=False)
        for each in self.more:
            builder = builder.add_extension(each, critical=True)
        hashing = None if issuer.key == "ed25519" else getattr(hashes, self.hashed.upper())()
        filled = padding.PSS(padding.MGF1(hashes.SHA256()), 32) if self.pss else None
        certificate = builder.sign(keys[1], hashing, rsa_padding=filled)
        path = directory / f"{file or self.name}.crt"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        path.with_suffix(".pem").write_bytes(keys[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path


def subject(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Amt für Prüfung, Köln"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


ROOT = Wanted("root", True, ("key_cert_sign", "crl_sign"), key="p384")
MIDDLE = Wanted("middle", True, ("key_cert_sign",))
LEAF = Wanted("leaf", False, ("digital_signature",), (CODE,))
CONSTRAINED = x509.NameConstraints([x509.DNSName("example.org")], None)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00")

TAKEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "for signing code": ({}, {}, {}),
    "of no extended usage": ({}, {}, {"extended": None}),
    "for code and mail": ({}, {}, {"extended": (CODE, MAIL)}),
    "without basic constraints": ({}, {}, {"authority": None}),
    "below one for code": ({}, {"extended": (CODE,)}, {}),
    "below one for code and more": ({}, {"extended": (CODE, SERVER)}, {}),
    "below a root for code": ({"extended": (CODE,)}, {}, {}),
    "below RSA with 2048 bits": ({"key": "rsa2048"}, {"key": "rsa3072"}, {}),
    "below RSA with PSS": ({"key": "rsa2048"}, {"pss": True}, {}),
    "below Ed25519": ({"key": "ed25519"}, {"key": "ed25519"}, {}),
    "with SHA-384": ({"hashed": "sha384"}, {"hashed": "sha512"}, {"hashed": "sha384"}),
    "of P-384": ({}, {}, {"key": "p384"}),
    "within a length": ({"below": 1}, {"below": 0}, {}),
    "within names": ({}, {"more": (CONSTRAINED,)}, {"alternatives": (x509.DNSName("a.example.org"),)}),
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "for servers": ({}, {}, {"extended": (SERVER,)}),
    "for clients": ({}, {}, {"extended": (CLIENT,)}),
    "for servers and clients": ({}, {}, {"extended": (SERVER, CLIENT)}),
    "for mail": ({}, {}, {"extended": (MAIL,)}),
    "for anything": ({}, {}, {"extended": (ANY,)}),
    "for code and servers": ({}, {}, {"extended": (CODE, SERVER)}),
    "for code and anything": ({}, {}, {"extended": (CODE, ANY)}),
    "of no usage": ({}, {}, {"usages": None}),
    "for encrypting": ({}, {}, {"usages": ("key_encipherment",)}),
    "for commitments": ({}, {}, {"usages": ("content_commitment",)}),
    "an authority": ({}, {}, {"authority": True, "usages": ("digital_signature", "key_cert_sign")}),
    "below one for servers": ({}, {"extended": (SERVER,)}, {}),
    "below one for anything": ({}, {"extended": (ANY,)}, {}),
    "below one that is no authority": ({}, {"authority": False}, {}),
    "below one without constraints": ({}, {"authority": None}, {}),
    "below one without a usage": ({}, {"usages": None}, {}),
    "below one that signs lists": ({}, {"usages": ("crl_sign", "digital_signature")}, {}),
    "below a root for servers": ({"extended": (SERVER, CLIENT)}, {}, {}),
    "below a root that is no authority": ({"authority": False}, {}, {}),
    "below a root without a usage": ({"usages": None}, {}, {}),
    "below RSA with 1024 bits": ({}, {"key": "rsa1024"}, {}),
    "below a root of RSA with 1024 bits": ({"key": "rsa1024"}, {}, {}),
    "below P-224": ({}, {"key": "p224"}, {}),
    "below a root of P-224": ({"key": "p224"}, {}, {}),
    "below a curve of others": ({}, {"key": "k256"}, {}),
    "with SHA-224": ({}, {}, {"hashed": "sha224"}),
    "below one with SHA-224": ({}, {"hashed": "sha224"}, {}),
    "below a root with SHA-224": ({"hashed": "sha224"}, {}, {}),
    "too far down": ({"below": 0}, {}, {}),
    "out of names": ({}, {"more": (CONSTRAINED,)}, {"alternatives": (x509.DNSName("a.example.com"),)}),
    "with a part that nobody knows": ({}, {}, {"more": (UNKNOWN,)}),
}


def chain_of(changes: tuple[dict[str, Any], ...], directory: Path) -> list[Path]:
    """Root, intermediate and signing certificate."""
    root, middle, leaf = (replace(each, **change) for each, change in zip((ROOT, MIDDLE, LEAF), changes, strict=True))
    return [root.made(root, directory), middle.made(root, directory), leaf.made(middle, directory)]


def sign_by(bundle: Path, chain: list[Path]) -> None:
    """Sign as another tool would, which looks at no use of a certificate."""
    _, middle, leaf = chain
    digests = tree(bundle)
    digests.pop("model.sig", None)
    signer: Any = Config().use_certificate_signer(
        private_key=leaf.with_suffix(".pem"), signing_certificate=leaf, certificate_chain=[middle]
    )
    (bundle / "model.sig").write_bytes(Signatory(signer._signer, "certificate").model_signature("bundle", digests))


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_a_certificate_for_code_signs(
    changes: tuple[dict[str, Any], ...], release: Path, outcome: Judge, tmp_path: Path
) -> None:
    chain = chain_of(changes, tmp_path)
    sign_by(release, chain)
    assert outcome(release, root=chain[0]).code == 0
    open_signatory(KeyFiles(chain[2].with_suffix(".pem"), chain[2], (chain[1], chain[0])))


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_a_certificate_for_something_else_does_not(
    changes: tuple[dict[str, Any], ...], release: Path, outcome: Judge, tmp_path: Path
) -> None:
    chain = chain_of(changes, tmp_path)
    sign_by(release, chain)
    assert outcome(release, root=chain[0]).code == EXIT_UNVERIFIED
    if not any("below" in change or "more" in change for change in changes):
        with pytest.raises(InputError, match="cannot sign"):
            open_signatory(KeyFiles(chain[2].with_suffix(".pem"), chain[2], (chain[1], chain[0])))


def put_into_chain(release: Path, *certificates: Path) -> None:
    """Other certificates than the signature came with, below the one that signed."""
    table = json.loads((release / "model.sig").read_bytes())
    chain = table["verificationMaterial"]["x509CertificateChain"]["certificates"]
    made = [from_pem(each.read_bytes())[0] for each in certificates]
    chain[1:] = [{"rawBytes": base64.b64encode(each).decode()} for each in made]
    (release / "model.sig").write_text(json.dumps(table))


def test_a_chain_has_nothing_that_nobody_looks_at(release: Path, outcome: Judge, tmp_path: Path) -> None:
    root, middle, leaf = chain_of(({}, {}, {}), tmp_path)
    (tmp_path / "other").mkdir()
    another, twin, _ = chain_of(({}, {}, {}), tmp_path / "other")
    stranger = replace(MIDDLE, name="stranger").made(ROOT, tmp_path)
    sign_by(release, [root, middle, leaf])
    for legal in ((middle,), (middle, root), (root, middle)):
        put_into_chain(release, *legal)
        assert outcome(release, root=root).code == 0
    for illegal in ((), (root,), (middle, stranger), (middle, twin), (middle, another), (middle, leaf)):
        put_into_chain(release, *illegal)
        assert outcome(release, root=root).code == EXIT_UNVERIFIED


@pytest.mark.parametrize("key", ["rsa3072", "ed25519", "k256", "p224"])
def test_a_key_of_another_kind_signs_nothing(key: str, release: Path, outcome: Judge, tmp_path: Path) -> None:
    chain = chain_of(({}, {}, {}), tmp_path)
    sign_by(release, chain)
    table = json.loads((release / "model.sig").read_bytes())
    other = from_pem(replace(LEAF, key=key).made(MIDDLE, tmp_path).read_bytes())[0]
    certificates = table["verificationMaterial"]["x509CertificateChain"]["certificates"]
    certificates[0]["rawBytes"] = base64.b64encode(other).decode()
    (release / "model.sig").write_text(json.dumps(table))
    assert outcome(release, root=chain[0]).code == EXIT_UNVERIFIED


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_broken_hash_vouches_for_nothing(which: int, release: Path, outcome: Judge, tmp_path: Path) -> None:
    """Made by openssl: cryptography does not sign so any more."""
    used = ["sha256"] * 3
    used[which] = "sha1"
    root = certify(tmp_path, "root", None, AUTHORITY, used[0])
    middle = certify(tmp_path, "middle", (root, tmp_path / "root.pem"), AUTHORITY, used[1])
    chain = [root, middle, certify(tmp_path, "leaf", (middle, tmp_path / "middle.pem"), SIGNING, used[2])]
    sign_by(release, chain)
    judged = outcome(release, root=chain[0])
    assert judged.code == EXIT_UNVERIFIED and "too weak" in judged


NAMED = replace(
    LEAF,
    alternatives=(x509.RFC822Name("releases@example.org"), x509.UniformResourceIdentifier("https://example.org/r")),
)
DISTINGUISHED = "CN=leaf,O=Amt für Prüfung\\, Köln,C=DE"


@pytest.mark.parametrize(
    "name,legal",
    [
        (DISTINGUISHED, True), ("email:releases@example.org", True), ("URI:https://example.org/r", True),
        ("CN=leaf", False), ("leaf", False), ("", False), ("releases@example.org", False), ("DNS:leaf", False),
        ("CN=middle,O=Amt für Prüfung\\, Köln,C=DE", False), (DISTINGUISHED.lower(), False),
    ],
)  # fmt: skip
def test_a_subject_is_pinned(name: str, legal: bool, release: Path, outcome: Judge, tmp_path: Path) -> None:
    root, middle = ROOT.made(ROOT, tmp_path), MIDDLE.made(ROOT, tmp_path)
    sign_by(release, [root, middle, NAMED.made(MIDDLE, tmp_path)])
    judged = outcome(release, root=root, subject=name)
    assert judged.code == (0 if legal else EXIT_UNVERIFIED)
    assert legal or DISTINGUISHED in judged.package


def test_a_subject_needs_a_root(signed: Path, outcome: Judge, keys: Any) -> None:
    assert outcome(signed, key=keys.public, subject="CN=leaf").code == EXIT_INPUT


def test_a_name_is_written_as_openssl_writes_it(tmp_path: Path) -> None:
    for number, name in enumerate(("leaf", ' #a,b+c="d"\\<e>;ü\t ', "a#", " ", "a b", "日本語")):
        certificate = replace(LEAF, name=name).made(MIDDLE, tmp_path, str(number))
        asked = ["openssl", "x509", "-in", certificate, "-noout", "-subject", "-nameopt", "RFC2253,utf8,-esc_msb"]
        told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        assert told.strip() == f"subject={read(from_pem(certificate.read_bytes())[0]).subject}"


@given(st.binary(max_size=200))
@example(b"")
@example(b"0\x80\x00\x00")
@example(b"0\x03\x02\x01\x02")
def test_what_is_no_certificate_is_refused(content: bytes) -> None:
    with pytest.raises(UnfitCertificate):
        read(content)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n-----BEGIN X509 CERTIFICATE-----\n",
        b"-----BEGIN TRUSTED CERTIFICATE-----\nAAAA\n-----END TRUSTED CERTIFICATE-----\n",
    ],
)  # fmt: skip
def test_what_is_no_file_of_certificates_is_refused(content: bytes) -> None:
    with pytest.raises(UnfitCertificate):
        from_pem(content)
