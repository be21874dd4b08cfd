"""What strangers wrote costs no more than its limits, and is JSON in one way only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.foundation import untrusted
from glmexport.foundation.definition import Definition, parse_json
from glmexport.foundation.untrusted import LARGE, DocumentLimits, parse, read_regular, visible

FEW = DocumentLimits(size=1000, depth=3, values=20, items=5, keys=4, text=50, number=10)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_is_json_is_read_as_it_is(value: object, ascii_only: bool, indent: int | None) -> None:
    written = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    assert parse(written, LARGE) == json.loads(written)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b" " * 1001, "it has 1,001 bytes, and at most 1,000"),
        (b"[[[[]]]]", "nests deeper than 3"),
        (b'{"a":{"b":{"c":{}}}}', "nests deeper than 3"),
        (b"[1,2,3,4,5,6]", "more than 5 items"),
        (b"[[1,2,3,4,5],[1,2,3,4,5],[1,2,3,4,5],[1]]", "more than 20 values"),
        (b'{"a":1,"b":1,"c":1,"d":1,"e":1}', "more than 4 keys"),
        (b'["' + b"a" * 60 + b'"]', "a text in it has more than 50"),
        (b'["' + b'\\"' * 30 + b'"]', "a text in it has more than 50"),
        (b'{"' + b"a" * 60 + b'":1}', "a key in it has more than 50"),
        (b"12345678901", "more than 10 digits"),
        (b'{"a":1,"a":2}', "key 'a' is given twice"),
        (b'{"a":1,"\\u0061":2}', "key 'a' is given twice"),
        (b'{"\\"":1,"\\u0022":2}', "is given twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b'["\\ud800"]', "half of a pair"),
        (b'["\xff"]', "is not UTF-8"),
        (b'"a', "does not end"),
        (b'"a\\"', "does not end"),
        (b"]" * 50, "closes what was not opened"),
        (b"[1", "no JSON at line 1"),
        (b"", "no JSON at line 1"),
    ],
)
def test_what_passes_a_limit_is_refused(document: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(document, FEW)


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\ntu0 1-\n').map(str.encode))
def test_any_bytes_are_read_or_refused_as_a_value(document: bytes) -> None:
    try:
        parse(document, LARGE)
    except ValueError as error:
        assert str(error)


def test_equal_texts_with_escapes_end_where_json_has_them_end() -> None:
    for text in ('"', "\\", '\\"', "\\\\", 'a\\\\"b', '"]'):
        written = json.dumps([text, {text: 1}]).encode()
        assert parse(written, LARGE) == [text, {text: 1}]


class Item(Definition):
    """One of many."""

    name: str
    sizes: dict[str, int] | None = None
    more: tuple[Item, ...] = ()


class Items(Definition):
    """Many."""

    items: tuple[Item, ...]


@pytest.mark.parametrize(
    "document",
    [
        [{"nam": 1}] * 1000,
        [{"name": "a", "sizes": {str(number): "a" for number in range(1000)}}],
        [{"name": "a", "more": [{"name": 1}] * 1000}],
    ],
)
def test_a_check_ends_at_the_first_wrong_item(document: object) -> None:
    with pytest.raises(ValueError, match=r"items\.0\.") as refusal:
        parse_json(Items, json.dumps({"items": document}).encode())
    assert refusal.value.__cause__.error_count() <= 3  # type: ignore[union-attr]


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    assert read_regular("/proc/self/cmdline", 1 << 20)
    for name, message in (("file", "it has 5 bytes, and at most 4"), ("pipe", "not a regular"), (".", "a directory")):
        with pytest.raises(ValueError, match=message):
            read_regular(tmp_path / name, 4)
    with pytest.raises(ValueError, match="not a regular file"):
        read_regular("/dev/zero", 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 4)


def test_text_shows_all_that_is_in_it() -> None:
    assert visible("a\x1b[2Jb\u202e\n") == "a‹U+001B›[2Jb‹U+202E›↵"
    assert visible("می\u200cخواهم 中文 é", lines=True) == "می\u200cخواهم 中文 é"
    assert visible("a\n\tb\r", lines=True) == "a\n\tb‹U+000D›"


def test_the_module_needs_nothing_but_the_standard_library() -> None:
    program = f"import runpy, sys; runpy.run_path({untrusted.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert not {"glmexport", "pydantic"} & set(done.stdout.split())
