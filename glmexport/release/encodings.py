"""Readers of base64 and DER that take only the one way to write a value.

Standard library of Python 3.9: this is a part of verify.py.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE, SET = 2, 3, 4, 6, 0x30, 0x31


class Element(NamedTuple):
    """One element of DER: its tag, its content, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes


def decode_base64(text: bytes) -> bytes:
    """Return the bytes that ``text`` has in base64; raises ValueError unless an encoder would write the same text."""
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error
    if base64.b64encode(content) != text:
        raise ValueError("base64 with bits that nobody reads")
    return content


def read_elements(content: bytes) -> list[Element]:
    """Return the elements that stand one after the other in ``content``.

    Raises:
        ValueError, IndexError: it is no DER; nothing is taken that could be written shorter.
    """
    found, at = [], 0
    while at < len(content):
        start, tag, length = at, content[at], content[at + 1]
        at += 2
        if length > 127:
            count = length - 128
            length = int.from_bytes(content[at : at + count], "big")
            at += count
            if length < 128 or length.bit_length() <= 8 * (count - 1):
                raise ValueError("length")
        if tag & 31 == 31 or at + length > len(content):
            raise ValueError("tag or length")
        found.append(Element(tag, content[at : at + length], content[start : at + length]))
        at += length
    return found


def content_of_only(content: bytes, tag: int) -> bytes:
    """Return the content of the one element of ``content``; raises ValueError unless there is one, with that tag."""
    (element,) = read_elements(content)
    return content_of(element, tag)


def content_of(element: Element, tag: int) -> bytes:
    """Return the content of an element; raises ValueError unless it has that tag."""
    if element.tag != tag:
        raise ValueError("tag")
    return element.content


def read_identifier(element: Element) -> str:
    """Return an object identifier in decimals; raises ValueError or IndexError if it is none."""
    content, numbers, value = content_of(element, OBJECT_IDENTIFIER), [], 0
    for byte in content:
        if not value and byte == 0x80:
            raise ValueError("identifier")
        value = value << 7 | byte & 127
        if byte < 128:
            numbers.append(value)
            value = 0
    if content[-1] > 127:
        raise ValueError("identifier")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, (first, numbers[0] - 40 * first, *numbers[1:])))


def read_natural(element: Element) -> int:
    """Return an integer that is not negative; raises ValueError or IndexError if it is none, or has idle zeros."""
    content = content_of(element, INTEGER)
    if content[0] > 127 or (content[0] == 0 and len(content) > 1 and content[1] < 128):
        raise ValueError("integer")
    return int.from_bytes(content, "big")


def read_bits(element: Element) -> tuple[bytes, int]:
    """Return the bytes of a bit string, and how many of the last bits are unused.

    Raises:
        ValueError, IndexError: it is no bit string, or a bit that is unused is set.
    """
    unused, content = content_of(element, BIT_STRING)[0], element.content[1:]
    if unused > 7 or (unused and content[-1] & ((1 << unused) - 1)):
        raise ValueError("unused bits")
    return content, unused


def read_whole_bytes(element: Element) -> bytes:
    """Return the bytes of a bit string; raises ValueError or IndexError if it is none, or has unused bits."""
    content, unused = read_bits(element)
    if unused:
        raise ValueError("unused bits")
    return content


def is_ecdsa_signature(content: bytes) -> bool:
    """Return whether ``content`` is DER of two positive integers and nothing else, as RFC 3279 has a signature."""
    try:
        first, second = read_elements(content_of_only(content, SEQUENCE))
        return read_natural(first) > 0 and read_natural(second) > 0
    except (ValueError, IndexError):
        return False
