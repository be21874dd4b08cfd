"""Typed reads: the value, or an error that names file, key, what was found and what is accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError

VALUES: dict[str, object] = {
    "layers": 40,
    "one": True,
    "theta": 10000.0,
    "whole": 3.0,
    "name": "glm4",
    "bias": False,
    "eos": [1, 2],
    "head": None,
    "inner": {"factor": "x"},
    "infinite": float("inf"),
    "huge": 10**400,
}


@pytest.fixture
def config() -> ConfigReader:
    return ConfigReader(VALUES, "config.json")


def test_values_are_read_by_type(config: ConfigReader) -> None:
    assert config.integer("layers", minimum=40) == 40
    assert config.number("theta") == 10000.0
    assert config.number("layers") == 40.0
    assert config.text("name") == "glm4"
    assert config.flag("bias") is False
    assert config.integers("eos") == (1, 2)
    assert config.integers("layers") == (40,)
    assert config.choice("name", ("glm4", "glm4_moe")) == "glm4"
    assert config.optional_integer("layers") == 40


def test_null_and_absent_are_told_apart(config: ConfigReader) -> None:
    assert config.optional_integer("head") is None
    assert config.optional_integer("absent") is None
    assert not config.has("head")
    assert not config.has("absent")
    assert config.has("bias")
    with pytest.raises(CheckpointError, match="head is null"):
        config.integer("head", default=3)


def test_a_default_stands_in_for_an_absent_key_only(config: ConfigReader) -> None:
    assert config.integer("absent", default=0) == 0
    assert config.number("absent", default=0.0) == 0.0
    assert config.text("absent", default="") == ""
    assert config.flag("absent", default=False) is False
    assert config.integers("absent", default=()) == ()
    assert config.choice("absent", ("silu",), default="silu") == "silu"


@pytest.mark.parametrize(
    ("method", "key", "arguments", "found", "accepted"),
    [
        ("integer", "one", {}, "true", "an integer"),
        ("integer", "whole", {}, "3.0", "an integer"),
        ("integer", "name", {}, '"glm4"', "an integer"),
        ("integer", "layers", {"minimum": 41}, "40", "an integer of at least 41"),
        ("optional_integer", "theta", {}, "10000.0", "an integer"),
        ("integers", "one", {}, "true", "an integer or a list of integers"),
        ("integers", "eos", {"minimum": 2}, "[1, 2]", "an integer or a list of integers of at least 2"),
        ("number", "one", {}, "true", "a finite number"),
        ("number", "infinite", {}, "Infinity", "a finite number"),
        ("number", "huge", {}, "1000", "a finite number"),
        ("number", "theta", {"minimum": 1e5}, "10000.0", "a finite number of at least 100000"),
        ("text", "layers", {}, "40", "a text"),
        ("flag", "layers", {}, "40", "true or false"),
        ("choice", "name", {"supported": ("silu", "gelu")}, '"glm4"', "one of silu, gelu"),
        ("section", "eos", {}, "[1, 2]", "a table"),
    ],
)
def test_another_type_is_refused_by_name(
    config: ConfigReader, method: str, key: str, arguments: dict[str, Any], found: str, accepted: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        getattr(config, method)(key, **arguments)
    assert refusal.value.message.startswith(f"config.json: {key} is {found}")
    assert refusal.value.message.endswith(f"accepted is {accepted}.")
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize("method", ["integer", "integers", "number", "text", "flag", "section"])
def test_an_absent_key_without_default_is_refused(config: ConfigReader, method: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"^config\.json: rope_theta is missing, and .* is needed there"
    ):
        getattr(config, method)("rope_theta")


def test_a_section_says_where_it_is(config: ConfigReader) -> None:
    with pytest.raises(CheckpointError, match=r'config\.json: inner: factor is "x"'):
        config.section("inner").number("factor")


def test_values_cannot_be_changed(config: ConfigReader) -> None:
    with pytest.raises(TypeError):
        config.values["layers"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "no JSON at line 1"),
        (b"[]", "its JSON is a list, not an object"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not usable"),
        (b"[" * 200_000, "nests deeper than 64"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        ConfigReader.open(path)
    assert refusal.value.message.startswith(str(path))
