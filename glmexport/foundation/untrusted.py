"""Checked reading of what strangers wrote: files up to a size, JSON of bounded cost, and text that shows all of itself.

A parser makes a hundred bytes of three (``[],``), and a million errors of a million wrong items. So the bytes are
scanned first, which builds nothing: how large they are, how deep they nest, how many values there are, and how long
lists, texts and numbers get. What passes takes a small multiple of its limits in memory, whatever is in it.

This module needs nothing but Python 3.9's standard library, so that programs on other machines can carry it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from typing import Any, BinaryIO

_MIB = 1 << 20


@dataclass(frozen=True)
class DocumentLimits:
    """The bounds of a document that is accepted."""

    #: Bytes of the whole document.
    size: int = 64 * _MIB
    #: Depth of lists and objects in one another.
    depth: int = 64
    #: Values of the whole document: texts, numbers, true, false, null, lists, objects, and the keys of objects.
    values: int = 1_000_000
    #: Items of one list.
    items: int = 500_000
    #: Keys of one object.
    keys: int = 20_000
    #: Bytes of one text as it is written.
    text: int = 8 * _MIB
    #: Bytes of one number, true, false or null as it is written.
    number: int = 400
    #: Whether NaN and Infinity, which are no JSON, are numbers all the same.
    nonfinite: bool = False


#: Limits of a document of a few facts.
SMALL = DocumentLimits(size=4 * _MIB, values=100_000, items=50_000, text=_MIB)
#: Limits of a document that lists every matrix, operator or token of a large model.
LARGE = DocumentLimits()


def open_regular(path: str | os.PathLike[str]) -> tuple[BinaryIO, int]:
    """Open a regular file, links followed, and return it with its size in bytes; nothing is waited for.

    Raises:
        ValueError: it is a pipe, a device or a directory; completes a sentence that ends in a colon.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ValueError(f"it is {what}")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Read the content of a regular file; nothing above ``most`` bytes is read.

    Raises:
        ValueError: as ``open_regular``, or it has more than ``most`` bytes.
        OSError: it cannot be read.
    """
    file, size = open_regular(path)
    with file:
        # One that grows meanwhile, or whose size the system does not know, is read no further either.
        data = b"" if size > most else file.read(min(max(size, 1 << 16), most) + 1)
    size = max(size, len(data))
    if size > most:
        raise ValueError(f"it has {size:,} bytes, and at most {most:,} are accepted")
    return data


def parse(data: bytes, limits: DocumentLimits) -> Any:
    """Return the JSON value that UTF-8 bytes stand for.

    Raises:
        ValueError: as ``scan``; not UTF-8, not JSON, or a text with half of a pair of surrogates; completes a sentence
            that ends in a colon.
    """
    scan(data, limits)
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno} ({error.msg})") from error
    if b"\\ud" in data or b"\\uD" in data:
        _refuse_half_pairs(value)
    return value


def parse_object(data: bytes, limits: DocumentLimits) -> dict[str, Any]:
    """Parse a document as ``parse`` does, and require an object at its top level."""
    value = parse(data, limits)
    if not isinstance(value, dict):
        raise ValueError(f"its JSON is a {type(value).__name__}, not an object")
    return value


#: A token of JSON: a separator, a key, a text without escapes, the beginning of any other, an opening, a closing, a
#: number or word. None of them repeats more than one set of characters, so that a match needs no memory.
_TOKEN = re.compile(
    rb'[ \t\r\n,:]+|("[^"\\]*")[ \t\r\n]*:|("[^"\\]*")|(")|([\[{])|([\]}])|([^ \t\r\n"\[\]{},:]+)',
)
_KEY, _TEXT, _QUOTE, _OPEN, _CLOSE, _WORD = range(1, 7)
_COLON = re.compile(rb"[ \t\r\n]*:")
_NONFINITE = frozenset({b"NaN", b"Infinity", b"-Infinity"})


def scan(data: bytes, limits: DocumentLimits) -> None:
    """Check what a document would cost, and that no object has a key twice; builds nothing.

    It does not check that the document is JSON, which a parser does afterwards.

    Raises:
        ValueError: a limit is passed, or a key is given twice; completes a sentence that ends in a colon.
    """
    if len(data) > limits.size:
        raise ValueError(f"it has {len(data):,} bytes, and at most {limits.size:,} are accepted")
    state, position = _Scan(limits), 0
    while position < len(data):
        for match in _TOKEN.finditer(data, position):
            kind = match.lastindex
            if kind is None:
                continue
            if kind == _QUOTE:
                # One with escapes; the search goes on behind it.
                start = match.start()
                position = _end_of_text(data, start, limits.text)
                is_key = _COLON.match(data, position) is not None
                (state.key if is_key else state.text)(data[start:position])
                break
            state.take[kind](match[kind])
        else:
            return


class _Scan:
    """The counts so far: of the whole, and of every list and object that is open."""

    def __init__(self, limits: DocumentLimits) -> None:
        self._limits = limits
        self._left = limits.values
        #: Items and keys of what is open, the whole first.
        self._items = [0]
        self._keys: list[set[bytes]] = [set()]
        self.take = {
            _KEY: self.key, _TEXT: self.text, _OPEN: self.open, _CLOSE: self.close, _WORD: self.word,
        }  # fmt: skip

    def _value(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {self._limits.values:,} values")
        self._items[-1] += 1
        if self._items[-1] > self._limits.items:
            raise ValueError(f"a list in it has more than {self._limits.items:,} items")

    def key(self, text: bytes) -> None:
        """A text with a colon behind it."""
        self._left -= 1
        if b"\\" in text:
            text = _plain(text)
        keys = self._keys[-1]
        if text in keys:
            raise ValueError(f"key {text[1:-1].decode('utf-8', 'replace')[:80]!r} is given twice")
        keys.add(text)
        if len(keys) > self._limits.keys:
            raise ValueError(f"an object in it has more than {self._limits.keys:,} keys")
        if len(text) > self._limits.text:
            raise ValueError(f"a key in it has more than {self._limits.text:,} bytes")

    def text(self, text: bytes) -> None:
        """Any other text."""
        self._value()
        if len(text) > self._limits.text:
            raise ValueError(f"a text in it has more than {self._limits.text:,} bytes")

    def word(self, word: bytes) -> None:
        """A number, or what else is no text."""
        self._value()
        if len(word) > self._limits.number:
            raise ValueError(f"a number in it has more than {self._limits.number} digits")
        if word in _NONFINITE and not self._limits.nonfinite:
            raise ValueError(f"{word.decode()} is no number of JSON")

    def open(self, _: bytes) -> None:
        """A list or an object begins."""
        self._value()
        self._items.append(0)
        self._keys.append(set())
        if len(self._items) > self._limits.depth + 1:
            raise ValueError(f"it nests deeper than {self._limits.depth} lists and objects")

    def close(self, _: bytes) -> None:
        """The innermost of what is open ends."""
        if len(self._items) == 1:
            raise ValueError("no JSON: a bracket closes what was not opened")
        self._items.pop()
        self._keys.pop()


def _end_of_text(data: bytes, start: int, most: int) -> int:
    """The position behind the text whose quote is at ``start``."""
    end = start
    while True:
        end = data.find(b'"', end + 1)
        if end < 0:
            raise ValueError("no JSON: a text in it does not end")
        if end - start > most:
            raise ValueError(f"a text in it has more than {most:,} bytes")
        before = end - 1
        while data[before] == 0x5C:  # a backslash
            before -= 1
        if (end - before) % 2:
            return end + 1


def _plain(text: bytes) -> bytes:
    """A text without what escapes need not hide; as it is where it is no JSON."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:
        return text


def _refuse_half_pairs(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text in it has half of a pair of surrogates") from error


_JOINERS = "\u200c\u200d"
_SHOWN = {"\n": "↵", "\t": "⇥"}


def visible(text: str, *, lines: bool = False) -> str:
    """Return ``text`` with control and formatting characters spelled out, so that none hides, reorders or commands.

    The joiners that Persian and the Indic scripts are written with stay; with ``lines`` so do line feeds and tabs.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if lines and character in _SHOWN else _visible(character) for character in text
    )


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return f"‹U+{ord(character):04X}›"
    return character
