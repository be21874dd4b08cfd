"""A reader of X.509 certificates in DER: whether a chain may sign releases, and whose it is.

RFC 5280 has the fields. Which usages a certificate for signing code has follows the CA/Browser Forum's Baseline
Requirements for Code Signing Certificates, so that one for TLS signs no release. Whether the signatures in a chain hold
is not looked at here. Standard library of Python 3.9: this is a part of verify.py.
"""

from __future__ import annotations

import base64
import calendar
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

from glmexport.release.encodings import (
    OCTET_STRING,
    SEQUENCE,
    SET,
    Element,
    content_of,
    content_of_only,
    decode_base64,
    read_bits,
    read_elements,
    read_identifier,
    read_natural,
    read_whole_bytes,
)

_VERSION, _EXTENSIONS = 0xA0, 0xA3
#: A boolean, which DER writes only where it is not the default.
_TRUE = b"\x01\x01\xff"
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s(.*?)-----END \1-----", re.DOTALL)
_RSA, _RSA_PSS, _EC = "1.2.840.113549.1.1.1", "1.2.840.113549.1.1.10", "1.2.840.10045.2.1"
_EDWARDS = frozenset({"1.3.101.112", "1.3.101.113"})
#: Least bits of an RSA key; keys on elliptic curves are of these, by the hash that is signed with them.
SMALLEST_RSA = 2048
CURVES = {"1.2.840.10045.3.1.7": "sha256", "1.3.132.0.34": "sha384", "1.3.132.0.35": "sha512"}
_SHA2 = frozenset(f"2.16.840.1.101.3.4.2.{each}" for each in (1, 2, 3))
#: Signature algorithms: RSA, then ECDSA, each with SHA-256, SHA-384 and SHA-512.
_SIGNATURES = _EDWARDS | {
    _RSA_PSS,
    *(f"1.2.840.113549.1.1.{each}" for each in (11, 12, 13)),
    *(f"1.2.840.10045.4.3.{each}" for each in (2, 3, 4)),
}
_KEY_USAGE, _ALTERNATIVES, _CONSTRAINTS, _EXTENDED = "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.37"
_SERVER, _CODE, _ANY = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.3", "2.5.29.37.0"
_DIGITAL_SIGNATURE, _CERTIFICATE_SIGN = 0x80, 0x04
#: Attributes of a name: those of RFC 4514, and two more that certificates of people and offices have.
_ATTRIBUTES = {
    "2.5.4.3": "CN", "2.5.4.5": "serialNumber", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.9": "STREET",
    "2.5.4.10": "O", "2.5.4.11": "OU", "0.9.2342.19200300.100.1.1": "UID", "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "emailAddress",
}  # fmt: skip
_PRINTABLE = 19
_ENCODINGS = {
    12: "utf-8", 18: "ascii", _PRINTABLE: "ascii", 20: "latin-1", 22: "ascii", 28: "utf-32-be", 30: "utf-16-be",
}  # fmt: skip
_ALTERNATIVE_KINDS = {0x81: "email", 0x82: "DNS", 0x86: "URI"}


class UnfitCertificate(Exception):
    """A certificate may not sign releases, or may not vouch for the one that does."""


class Certificate(NamedTuple):
    """One certificate: its name as RFC 4514 writes it, other names such as ``email:x@y``, and what it may do.

    ``named`` and ``issuer`` are names in DER, ``whole`` is all of it, ``key`` the SubjectPublicKeyInfo in DER,
    ``starts`` the seconds since 1970 at which it becomes valid, and ``extended`` the object identifiers of its extended
    usages, or None where it has no such extension.
    """

    whole: bytes
    named: bytes
    issuer: bytes
    subject: str
    alternatives: tuple[str, ...]
    key: bytes
    starts: int
    signature: str
    authority: bool
    usage: int
    extended: frozenset[str] | None


def from_pem(content: bytes) -> list[bytes]:
    """Return the certificates in a PEM file, DER.

    Raises:
        UnfitCertificate: there is none, or something else is in it.
    """
    blocks = _PEM.findall(content)
    if not blocks or content.count(b"-----BEGIN ") != len(blocks) or {kind for kind, _ in blocks} != {b"CERTIFICATE"}:
        raise UnfitCertificate("it has to have certificates in PEM and nothing else")
    try:
        return [decode_base64(b"".join(body.split())) for _, body in blocks]
    except ValueError as error:
        raise UnfitCertificate("a certificate in it is damaged") from error


def to_pem(kind: str, content: bytes) -> str:
    """Return DER as a block of PEM."""
    lines = re.findall(".{1,64}", base64.b64encode(content).decode())
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""])


def check_chain(chain: Sequence[bytes], roots: Sequence[bytes], subject: str | None) -> Certificate:
    """Return the signing certificate, the first of ``chain``, if all that are given may do what they are there for.

    That each is vouched for by the next has to be verified elsewhere, with no others than these. With ``subject`` the
    signing certificate has that name. Raises UnfitCertificate, which names the certificate.
    """
    signer, *others = [read(each) for each in chain]
    trusted = [read(each) for each in roots]
    _require_path(signer, others, trusted)
    for each in (*others, *trusted):
        _check_strength(each)
        if not each.authority or not each.usage & _CERTIFICATE_SIGN:
            raise UnfitCertificate(f"{each.subject} is no authority: it needs CA:TRUE and the key usage keyCertSign")
        if each.extended is not None and _CODE not in each.extended:
            raise UnfitCertificate(f"{each.subject} has extended key usages, and codeSigning is not among them")
    _check_strength(signer)
    if signer.authority or not signer.usage & _DIGITAL_SIGNATURE:
        raise UnfitCertificate(
            f"{signer.subject} is not for signing: it needs the key usage digitalSignature, and CA:FALSE"
        )
    if signer.extended is not None and (_CODE not in signer.extended or signer.extended & {_ANY, _SERVER}):
        raise UnfitCertificate(f"{signer.subject} has other extended key usages than one for signing code: codeSigning")
    if subject is not None and subject not in (signer.subject, *signer.alternatives):
        raise UnfitCertificate(f"it is of {' or '.join((signer.subject, *signer.alternatives))}, and not of {subject}")
    return signer


def _require_path(signer: Certificate, others: list[Certificate], roots: list[Certificate]) -> None:
    """Require that each certificate is a root that is trusted, or the one that vouches for another."""
    below, trusted = signer, {root.whole for root in roots}
    left = [each for each in others if each.whole not in trusted]
    while left:
        above = [each for each in left if each.named == below.issuer]
        if len(above) != 1 or below.issuer in {root.named for root in roots}:
            raise UnfitCertificate(
                f"beside {below.subject} there are certificates that do not vouch for it, or not alone"
            )
        (below,) = above
        left.remove(below)


def _check_strength(certificate: Certificate) -> None:
    if certificate.signature not in _SIGNATURES:
        raise UnfitCertificate(f"{certificate.subject} is signed with an algorithm that is too weak or not known")
    kind, size = _strength(certificate.key)
    if not (kind in _EDWARDS or (kind == _EC and size) or (kind in (_RSA, _RSA_PSS) and size >= SMALLEST_RSA)):
        raise UnfitCertificate(f"{certificate.subject} has a key that is too short, or of a kind that is not used here")


def _strength(key: bytes) -> tuple[str, int]:
    """Return the object identifier of a key's algorithm, and a size.

    The size is the bits of an RSA modulus, 1 for a curve that is known, and 0 for any other key.
    """
    try:
        algorithm, encoded = read_elements(content_of_only(key, SEQUENCE))
        kind, *parameters = read_elements(content_of(algorithm, SEQUENCE))
        name, content = read_identifier(kind), read_whole_bytes(encoded)
        if name in (_RSA, _RSA_PSS):
            modulus, _ = read_elements(content_of_only(content, SEQUENCE))
            return name, read_natural(modulus).bit_length()
        return name, int(name == _EC and read_identifier(parameters[0]) in CURVES)
    except (ValueError, IndexError) as error:
        raise UnfitCertificate("a certificate has a damaged key") from error


def hash_of_key(key: bytes) -> str | None:
    """Return the hash that is signed with a key on the curve P-256, P-384 or P-521 (DER); None for any other key."""
    try:
        algorithm, _ = read_elements(content_of_only(key, SEQUENCE))
        kind, *parameters = read_elements(content_of(algorithm, SEQUENCE))
        return CURVES.get(read_identifier(parameters[0])) if read_identifier(kind) == _EC else None
    except (ValueError, IndexError):
        return None


def read(content: bytes) -> Certificate:
    """Read a certificate in DER.

    Raises:
        UnfitCertificate: it is none of version 3, or is written in more than one way.
    """
    try:
        signed, algorithm, signature = read_elements(content_of_only(content, SEQUENCE))
        version, _, inner, issuer, validity, subject, key, *rest = read_elements(content_of(signed, SEQUENCE))
        if version.whole != b"\xa0\x03\x02\x01\x02" or inner.whole != algorithm.whole:
            raise ValueError("version or algorithm")
        read_whole_bytes(signature)
        extensions = _extensions([each for each in rest if each.tag == _EXTENSIONS])
        extended = extensions.get(_EXTENDED)
        uses = None if extended is None else read_elements(content_of_only(extended, SEQUENCE))
        return Certificate(
            content,
            subject.whole,
            issuer.whole,
            _name(subject),
            _alternatives(extensions.get(_ALTERNATIVES)),
            key.whole,
            _seconds(read_elements(content_of(validity, SEQUENCE))[0]),
            _signature(algorithm),
            _authority(extensions.get(_CONSTRAINTS)),
            _usage(extensions.get(_KEY_USAGE)),
            None if uses is None else frozenset(map(read_identifier, uses)),
        )
    except (ValueError, IndexError, OverflowError) as error:
        raise UnfitCertificate("a certificate is damaged, or not of version 3") from error


def _extensions(found: list[Element]) -> dict[str, bytes]:
    table: dict[str, bytes] = {}
    for element in found:
        for each in read_elements(content_of_only(element.content, SEQUENCE)):
            name, *critical, value = read_elements(content_of(each, SEQUENCE))
            # What is not critical has no boolean, for FALSE is what is meant without one.
            if critical and [element.whole for element in critical] != [_TRUE]:
                raise ValueError("critical")
            if read_identifier(name) in table:
                raise ValueError("an extension comes twice")
            table[read_identifier(name)] = content_of(value, OCTET_STRING)
    return table


def _signature(algorithm: Element) -> str:
    """Return the object identifier of a signature algorithm; that of RSASSA-PSS says if its hash is none of SHA-2."""
    kind, *parameters = read_elements(content_of(algorithm, SEQUENCE))
    if read_identifier(kind) != _RSA_PSS:
        return read_identifier(kind)
    hashes = [each for each in read_elements(content_of(parameters[0], SEQUENCE)) if each.tag == _VERSION]
    known = bool(hashes) and read_identifier(read_elements(content_of_only(hashes[0].content, SEQUENCE))[0]) in _SHA2
    return _RSA_PSS if known else f"{_RSA_PSS} without SHA-2"


def _authority(extension: bytes | None) -> bool:
    """Return whether the basic constraints are those of an authority."""
    found = [] if extension is None else read_elements(content_of_only(extension, SEQUENCE))
    true = [each for each in found[:1] if each.whole == _TRUE]
    for length in found[len(true) :]:
        read_natural(length)
    if len(found) > len(true) + 1:
        raise ValueError("basic constraints")
    return bool(true)


def _usage(extension: bytes | None) -> int:
    """Return the first eight usages, a bit each; 0, where there is no such extension."""
    if extension is None:
        return 0
    (element,) = read_elements(extension)
    bits, _ = read_bits(element)
    return bits[0] if bits else 0


def _seconds(moment: Element) -> int:
    """Return the seconds since 1970 of a UTCTime or a GeneralizedTime."""
    form = {23: "%y%m%d%H%M%SZ", 24: "%Y%m%d%H%M%SZ"}[moment.tag] if moment.tag in (23, 24) else ""
    if not re.fullmatch(rb"[0-9]{12}([0-9]{2})?Z", moment.content):
        raise ValueError("time")
    found = time.strptime(moment.content.decode("ascii"), form)
    # RFC 5280: two digits of a year from 50 on are of the last century.
    wrong = form.startswith("%y") and 2050 <= found.tm_year < 2069
    return calendar.timegm((found.tm_year - 100 * wrong, *found[1:6]))


def _name(element: Element) -> str:
    """Return a distinguished name as RFC 4514 writes it, the most special part first."""
    parts = []
    for each in read_elements(content_of(element, SEQUENCE)):
        pairs = [read_elements(content_of(pair, SEQUENCE)) for pair in read_elements(content_of(each, SET))]
        named = [(_ATTRIBUTES.get(read_identifier(kind), read_identifier(kind)), _value(text)) for kind, text in pairs]
        parts.append("+".join(f"{kind}={text}" for kind, text in named))
    return ",".join(reversed(parts))


def _value(element: Element) -> str:
    if element.tag == _PRINTABLE and not re.fullmatch(rb"[A-Za-z0-9 '()+,./:=?-]*", element.content):
        raise ValueError("printable string")
    if element.tag not in _ENCODINGS:
        return "#" + element.whole.hex()
    text = element.content.decode(_ENCODINGS[element.tag])
    escaped = re.sub(r'([\\,+"<>;]|^[# ]| $)', r"\\\1", text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: _hexadecimal(found[0]), escaped)


def _hexadecimal(character: str) -> str:
    return "".join(f"\\{byte:02X}" for byte in character.encode())


def _alternatives(extension: bytes | None) -> tuple[str, ...]:
    """Return the mail addresses, hosts and URIs of the alternative names, without those with invisible characters."""
    names = [] if extension is None else read_elements(content_of_only(extension, SEQUENCE))
    known = [each for each in names if each.tag in _ALTERNATIVE_KINDS]
    texts = [f"{_ALTERNATIVE_KINDS[each.tag]}:{each.content.decode('ascii')}" for each in known]
    return tuple(text for text in texts if text.isprintable())
