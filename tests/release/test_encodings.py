"""There is one way to write a signature: both verifiers refuse another spelling of its base64 and of its DER."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st
from signatures import Authority, Judge, Pair, make_authority, openssl, pair, resign, tree

from glmexport.foundation.errors import EXIT_INPUT, EXIT_UNVERIFIED
from glmexport.release.encodings import (
    Element,
    decode_base64,
    is_ecdsa_signature,
    read_bits,
    read_elements,
    read_natural,
)
from glmexport.release.keys import KeyFiles, open_signatory

#: Bytes of the longest signature of a key, by its curve.
LONGEST = {"prime256v1": 72, "secp384r1": 104, "secp521r1": 139}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def table_of(bundle: Path) -> dict[str, Any]:
    """Return the document in model.sig."""
    table: dict[str, Any] = json.loads((bundle / "model.sig").read_bytes())
    return table


def signature_of(bundle: Path) -> bytes:
    """Return the signature in model.sig."""
    return base64.b64decode(table_of(bundle)["dsseEnvelope"]["signatures"][0]["sig"])


def put_signature(bundle: Path, content: bytes) -> None:
    """Replace the signature in model.sig."""
    table = table_of(bundle)
    table["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(content).decode()
    (bundle / "model.sig").write_text(json.dumps(table))


def sign_by(authority: Authority, bundle: Path, wanted: Callable[[bytes], bool] = bool) -> None:
    """Sign by a certificate until the signature is as it is wanted."""
    signatory = open_signatory(KeyFiles(authority.key, authority.certificate, (authority.intermediate,)))
    digests = {name: digest for name, digest in tree(bundle).items() if name != "model.sig"}
    signature = b""
    while not signature or not wanted(signature):
        (bundle / "model.sig").write_bytes(signatory.model_signature("bundle", digests))
        signature = signature_of(bundle)


def length(content: bytes) -> bytes:
    """Return the length of ``content`` as DER has it; it is less than 256."""
    return bytes([len(content)]) if len(content) < 128 else bytes([0x81, len(content)])


def sequence(*elements: bytes) -> bytes:
    """Return a SEQUENCE."""
    return b"\x30" + length(b"".join(elements)) + b"".join(elements)


def integer(content: bytes) -> bytes:
    """Return an INTEGER, whether or not that is how it is written."""
    return b"\x02" + length(content) + content


def split(signature: bytes) -> tuple[bytes, bytes]:
    """Return the contents of the two integers of a signature."""
    first, second = (each.to_bytes(each.bit_length() // 8 + 1, "big") for each in decode_dss_signature(signature))
    return first, second


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "a zero behind it": lambda signature: signature + b"\0",
    "many bytes behind it": lambda signature: signature + bytes(range(256)),
    "itself behind it": lambda signature: signature * 2,
    "a line's end behind it": lambda signature: signature + b"\n",
    "a third number": lambda signature: sequence(*map(integer, split(signature)), integer(b"\1")),
    "nothing beside the numbers": lambda signature: sequence(*map(integer, split(signature)), b"\x05\x00"),
    "an idle zero": lambda signature: sequence(*(integer(b"\0" + each) for each in split(signature))),
    "a long length": lambda signature: b"\x30\x82\0" + bytes([len(signature[2:])]) + signature[2:],
    "a length of nothing": lambda signature: b"\x30\x80" + b"".join(map(integer, split(signature))) + b"\0\0",
    "a set": lambda signature: b"\x31" + signature[1:],
    "one number": lambda signature: sequence(integer(split(signature)[0])),
    "its last byte missing": lambda signature: signature[:-1],
    "the bare numbers": lambda signature: b"".join(map(integer, split(signature))),
    "the numbers without DER": lambda signature: b"".join(each[-32:].rjust(32, b"\0") for each in split(signature)),
    "nothing": lambda signature: b"",
}


@pytest.fixture(params=LONGEST)
def longest(request: pytest.FixtureRequest, release: Path, tmp_path: Path) -> Pair:
    """Return the key that made the signature of ``release``, which is as long as one of it can be.

    openssl reads as many bytes of a signature as this one has.
    """
    made = pair(tmp_path, "another", request.param)
    resign(release, made.private)
    while len(signature_of(release)) < LONGEST[request.param]:
        resign(release, made.private)
    return made


@pytest.mark.parametrize("content", [b"\0", b"\n", b"\0" * 1000, b"\x02\x01\x01"])
def test_nothing_stands_behind_a_signature(content: bytes, longest: Pair, release: Path, outcome: Judge) -> None:
    assert outcome(release, key=longest.public).code == 0
    put_signature(release, signature_of(release) + content)
    judged = outcome(release, key=longest.public)
    assert judged.code == EXIT_UNVERIFIED and "model.sig does not hold" in judged


def test_nothing_stands_behind_a_signature_by_a_certificate(
    authority: Authority, release: Path, outcome: Judge
) -> None:
    sign_by(authority, release, lambda signature: len(signature) == LONGEST["secp384r1"])
    assert outcome(release, root=authority.root).code == 0
    put_signature(release, signature_of(release) + b"\0")
    judged = outcome(release, root=authority.root)
    assert judged.code == EXIT_UNVERIFIED and "model.sig does not hold" in judged


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_signature_is_spelled_in_one_way(
    spelled: Callable[[bytes], bytes], release: Path, outcome: Judge
) -> None:
    changed = spelled(signature_of(release))
    assert not is_ecdsa_signature(changed)
    put_signature(release, changed)
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "model.sig does not hold" in judged


@given(st.integers(1, 1 << 521), st.integers(1, 1 << 521), st.binary(min_size=1))
def test_what_is_der_of_two_numbers(first: int, second: int, more: bytes) -> None:
    signature = encode_dss_signature(first, second)
    assert is_ecdsa_signature(signature)
    assert not is_ecdsa_signature(signature + more)
    assert not is_ecdsa_signature(signature[:-1])
    for wrong in (encode_dss_signature(0, second), encode_dss_signature(first, 0), sequence(integer(b""), signature)):
        assert not is_ecdsa_signature(wrong)


@given(st.binary())
def test_der_of_a_signature_is_what_an_encoder_writes(content: bytes) -> None:
    if is_ecdsa_signature(content):
        assert encode_dss_signature(*decode_dss_signature(content)) == content


@pytest.mark.parametrize("content", [b"", b"\0\0", b"\0\x7f", b"\x80", b"\xff\xff"])
def test_what_is_no_natural_number(content: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        read_natural(Element(2, content, integer(content)))


@pytest.mark.parametrize("content", [b"", b"\1", b"\1\1", b"\7\x81", b"\x08\0", b"\xff\0"])
def test_bits_that_nobody_reads_are_not_set(content: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        read_bits(Element(3, content, b""))


def spellings(text: str) -> Iterator[str]:
    """Yield other texts that a lenient reader of base64 takes for ``text``."""
    yield from (text + "=", text + "\n", text + " ", " " + text, text + "====", text + "\0", "\ufeff" + text)
    yield from (text[:8] + each + text[8:] for each in ("\n", "\r\n", " ", "=", "*", "-", "é"))
    if text.endswith("="):
        bare = text.rstrip("=")
        yield bare
        yield bare + "=" * (len(text) - len(bare) + 1)
        # The last bits of the last letter are not part of any byte.
        yield bare[:-1] + ALPHABET[ALPHABET.index(bare[-1]) + 1] + text[len(bare) :]


@given(st.binary())
def test_base64_is_spelled_in_one_way(content: bytes) -> None:
    text = base64.b64encode(content).decode()
    assert decode_base64(text.encode()) == content
    for each in spellings(text):
        with pytest.raises(ValueError, match="base64"):
            decode_base64(each.encode())


@given(st.text("AQgw+/-_= \n", max_size=8))
def test_base64_is_what_an_encoder_writes(text: str) -> None:
    try:
        content = decode_base64(text.encode())
    except ValueError:
        return
    assert base64.b64encode(content).decode() == text


def test_every_part_of_a_signature_is_in_one_spelling(authority: Authority, release: Path, outcome: Judge) -> None:
    sign_by(authority, release, lambda signature: len(signature) % 3 > 0)
    table = table_of(release)
    envelope, material = table["dsseEnvelope"], table["verificationMaterial"]
    first, second = material["x509CertificateChain"]["certificates"]
    parts = ((envelope, "payload"), (envelope["signatures"][0], "sig"), (first, "rawBytes"), (second, "rawBytes"))
    for part, key in parts:
        text = part[key]
        # The script is started for some of them; the reader of both is asked for all of them above.
        for each in [*spellings(text)][:: 4 if key != "sig" else 1]:
            part[key] = each
            (release / "model.sig").write_text(json.dumps(table))
            judged = outcome(release, root=authority.root)
            assert judged.code == EXIT_UNVERIFIED and "base64" in judged, (key, each[-9:])
        part[key] = text
    (release / "model.sig").write_text(json.dumps(table))
    assert outcome(release, root=authority.root).code == 0


def test_a_root_with_bits_that_nobody_reads_is_the_user_s(
    authority: Authority, release: Path, outcome: Judge, tmp_path: Path
) -> None:
    sign_by(authority, release)
    head, *lines, end = authority.root.read_text().splitlines()
    root = tmp_path / "root.crt"
    for each in (spelled for spelled in spellings("".join(lines)) if not set(spelled) & set("\n\r ")):
        root.write_text("\n".join((head, each, end, "")))
        assert outcome(release, root=root).code == EXIT_INPUT, each[-9:]
    root.write_text("\n".join((head, *lines, end, "")))
    assert outcome(release, root=root).code == 0


@pytest.mark.parametrize("form", ["compressed", "uncompressed"])
def test_a_key_with_one_coordinate_is_the_same_key(
    form: str, release: Path, keys: Pair, outcome: Judge, tmp_path: Path
) -> None:
    """The hint in model.sig is of a key with both."""
    for name, private, code in (("own", keys.private, 0), ("other", pair(tmp_path, "x").private, EXIT_UNVERIFIED)):
        public = tmp_path / f"{name}.pub.pem"
        openssl("ec", "-in", private, "-pubout", "-conv_form", form, "-out", public)
        judged = outcome(release, key=public)
        assert judged.code == code


#: What a certificate has, and what an authority could have signed in its place: other spellings and no DER.
CERTIFIED = {
    "a usage that is critical": ("0603551d0f0101ff", "0603551d0f010101"),
    "a usage that is not critical, spelled out": ("0603551d0f0101ff", "0603551d0f010100"),
    "usages with a bit that is unused": ("03020780", "03020781"),
    "usages with eight bits that are unused": ("03020780", "03020880"),
    "no authority, spelled out": ("300c0603551d130101ff04023000", "300c0603551d1304053003010100"),
    "a key with a bit that is unused": ("0362000", "0362010"),
    "a printable string that is none": ("0c046c656166", "13046c652a66"),
}


@pytest.mark.parametrize(("before", "after"), CERTIFIED.values(), ids=CERTIFIED)
def test_a_certificate_is_spelled_in_one_way(
    before: str, after: str, release: Path, outcome: Judge, tmp_path: Path
) -> None:
    authority = make_authority(tmp_path, "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n")
    sign_by(authority, release)
    table = table_of(release)
    leaf = table["verificationMaterial"]["x509CertificateChain"]["certificates"][0]
    (whole,) = read_elements(base64.b64decode(leaf["rawBytes"]))
    told, algorithm, _ = read_elements(whole.content)
    assert told.whole.hex().count(before) == 1
    issuer: Any = load_pem_private_key((tmp_path / "middle.pem").read_bytes(), None)
    for content, code in ((told.whole, 0), (bytes.fromhex(told.whole.hex().replace(before, after)), EXIT_UNVERIFIED)):
        bits = b"\0" + issuer.sign(content, ec.ECDSA(hashes.SHA256()))
        body = content + algorithm.whole + b"\x03" + length(bits) + bits
        leaf["rawBytes"] = base64.b64encode(b"\x30\x82" + len(body).to_bytes(2, "big") + body).decode()
        (release / "model.sig").write_text(json.dumps(table))
        judged = outcome(release, root=authority.root)
        assert judged.code == code
