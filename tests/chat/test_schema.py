"""Values of arguments by schemas as clients write them: pydantic's, those by hand, and those of enemies."""

from __future__ import annotations

import json
import time
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from glmexport.chat.schema import Parameters
from glmexport.chat.tool_calls import parse

INTEGER, STRING, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}
POINT = {"type": "object", "properties": {"x": INTEGER, "label": STRING}, "required": ["x"]}
TREE = {"anyOf": [INTEGER, {"$ref": "#/$defs/trees"}]}
TREES = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
DEFS = {"$defs": {"point": POINT, "size": {"enum": ["s", "m", 3]}, "tree": TREE, "trees": TREES}}


def typed(schema: Any, raw: str) -> Any:
    """The value of an argument, and what is wrong with it."""
    return Parameters({"type": "object", "properties": {"a": schema}, **DEFS}).value("a", raw)


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"anyOf": [INTEGER, NULL]}, "3", 3), ({"anyOf": [INTEGER, NULL]}, "null", None),
        ({"anyOf": [STRING, NULL]}, "3", "3"), ({"anyOf": [STRING, NULL]}, "null", None),
        ({"anyOf": [STRING, NULL]}, "", ""), ({"oneOf": [INTEGER, STRING]}, "3", 3),
        ({"oneOf": [INTEGER, STRING]}, "three", "three"), ({"oneOf": [INTEGER, {"type": "array"}]}, "[3]", [3]),
        ({"allOf": [INTEGER, {"minimum": 1}]}, "3", 3), ({"allOf": [{"$ref": "#/$defs/point"}]}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/point"}, '{"x": 1, "label": "3"}', {"x": 1, "label": "3"}),
        ({"anyOf": [{"$ref": "#/$defs/point"}, NULL]}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/tree"}, "[1, [2, []]]", [1, [2, []]]), ({"$ref": "#/$defs/size"}, "3", 3),
        ({"$ref": "#/$defs/size"}, "m", "m"), ({"enum": [1, 2]}, "2", 2), ({"enum": ["1", "2"]}, "2", "2"),
        ({"enum": [True, None]}, "true", True), ({"enum": [True, None]}, "null", None), ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"), ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["integer", "null"]}, "3", 3),
        ({"type": ["string", "null"]}, "null", None), ({"type": "integer", "nullable": True}, "null", None),
        ({"type": "number"}, "3", 3), ({"type": "number"}, "-2.5e3", -2500.0), ({"type": "boolean"}, "false", False),
        ({"type": "array", "items": {"anyOf": [INTEGER, STRING]}}, '[1, "a"]', [1, "a"]),
        ({"type": "object", "additionalProperties": INTEGER}, '{"k": 1}', {"k": 1}),
        ({"type": "array", "prefixItems": [INTEGER, STRING]}, '[1, "a", true]', [1, "a", True]),
        ({"properties": {"x": INTEGER}}, '{"x": 1}', {"x": 1}), ({"items": INTEGER}, "[1]", [1]),
        ({"minimum": 0}, "3", 3),
        ({"anyOf": [POINT, {"type": "object", "required": ["y"]}]}, '{"y": 1}', {"y": 1}),
        # What says nothing of types is a string.
        ({}, "3", "3"), (True, "[1]", "[1]"), ({"title": "a number"}, "3", "3"), ({"$ref": "#/no"}, "3", "3"),
        ({"type": "string"}, '"quoted"', '"quoted"'), ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_values(schema: Any, raw: str, value: Any) -> None:
    found, wrong = typed(schema, raw)
    assert found == value and type(found) is type(value) and not wrong


@pytest.mark.parametrize(
    ("schema", "raw", "reason"),
    [
        ({"anyOf": [INTEGER, NULL]}, "three", "is 'three', not of type integer or null"),
        ({"anyOf": [INTEGER, NULL]}, "3.5", "is '3.5', not of type integer or null"),
        ({"allOf": [INTEGER, {"enum": [1, 2]}]}, "3", "is '3', which is none of its forms"),
        ({"$ref": "#/$defs/point"}, '{"label": "a"}', """is '{"label": "a"}', which is none of its forms"""),
        ({"$ref": "#/$defs/point"}, "x=1", "is 'x=1', not of type object"),
        ({"$ref": "#/$defs/tree"}, '[1, "2"]', """is '[1, "2"]', which is none of its forms"""),
        ({"enum": ["a", "b"]}, "c", "is 'c', which is none of its values"),
        ({"enum": ["a", True]}, "false", "is 'false', which is none of its values"),
        ({"const": 5}, "6", "is '6', which is none of its values"),
        ({"type": "array", "items": INTEGER}, '["a"]', """is '["a"]', which is none of its forms"""),
        ({"type": "object", "additionalProperties": False}, '{"k": 1}',
         """is '{"k": 1}', which is none of its forms"""),
        ({"type": "number"}, "1e999", "is '1e999', not of type number"),
        ({"type": "integer", "anyOf": [{"enum": [1]}]}, "1,", "is '1,', not of type integer"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_fits_no_branch_is_told(schema: Any, raw: str, reason: str) -> None:
    found, wrong = typed(schema, raw)
    assert wrong == reason
    assert isinstance(found, str) or json.loads(raw) == found


class Unit(Enum):
    """As pydantic refers to one."""

    C = "C"
    F = "F"


class Place(BaseModel):
    """A model in a model."""

    name: str
    height: float | None = None


class Weather(BaseModel):
    """As LangChain makes a tool of one."""

    city: str
    days: int | None = None
    unit: Unit = Unit.C
    where: Place | str | None = None
    hours: list[int] | Literal["all"] = "all"


def test_a_tool_as_pydantic_declares_it() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}
    given = {"city": "7", "days": "3", "unit": "F", "where": '{"name": "7", "height": 400}', "hours": "[1, 2]"}
    text = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in given.items())
    parsed = parse(f"<tool_call>weather{text}</tool_call>", [tool])
    assert not parsed.faults
    values = {argument.key: argument.value for argument in parsed.calls[0].arguments}
    assert values == {**given, "days": 3, "where": {"name": "7", "height": 400}, "hours": [1, 2]}
    assert Weather.model_validate(values).where == Place(name="7", height=400)
    wrong = parse("<tool_call>weather<arg_key>days</arg_key><arg_value>soon</arg_value></tool_call>", [tool])
    assert [fault.reason for fault in wrong.faults] == [
        "weather needs the argument 'city'.", "weather: 'days' is 'soon', not of type integer or null.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Args", "$defs": {"Args": {"properties": {"a": INTEGER}, "required": ["a"]}}},
        {"allOf": [{"properties": {"a": INTEGER}}, {"required": ["a"]}]},
        {"anyOf": [{"properties": {"a": INTEGER, "b": STRING}, "required": ["a", "b"]},
                   {"properties": {"a": INTEGER}, "required": ["a"]}]},
    ],
)  # fmt: skip
def test_parameters_that_are_put_together(schema: dict[str, Any]) -> None:
    parameters = Parameters(schema)
    assert parameters.value("a", "3") == (3, "") and parameters.required == {"a"} and parameters.others is False


def test_arguments_that_are_not_named() -> None:
    assert Parameters({}).others is True and Parameters({"properties": {}}).others is False
    assert Parameters({"properties": {}, "additionalProperties": INTEGER}).value("any", "3") == (3, "")
    assert Parameters({"properties": {}, "patternProperties": {"x.*": INTEGER}}).others is True


kinds = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "a", "3", "null"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2)
)
schemas: st.SearchStrategy[Any] = st.recursive(
    st.builds(lambda kind: {"type": kind}, kinds | st.lists(kinds, min_size=1, max_size=2, unique=True))
    | st.builds(lambda choices: {"enum": choices}, st.lists(scalars, min_size=1, max_size=3))
    | st.builds(lambda value: {"const": value}, values),
    lambda inner: (
        st.dictionaries(st.sampled_from(["anyOf", "allOf"]), st.lists(inner, min_size=1, max_size=3), min_size=1)
        | st.builds(lambda each: {"type": "array", "items": each}, inner)
        | st.builds(lambda each: {"type": "object", "properties": {"x": each}, "required": ["x"]}, inner)
    ),
    max_leaves=5,
)  # fmt: skip


@given(schema=schemas, value=values)
def test_values_as_glm_writes_them_come_back(schema: Any, value: Any) -> None:
    """What fits, by a validator of the specification, is read without a fault as something that fits."""
    raw = value if isinstance(value, str) else json.dumps(value)
    found, wrong = Parameters({"properties": {"a": schema}}).value("a", raw)
    validator = Draft202012Validator(schema)
    if validator.is_valid(value):
        assert not wrong and validator.is_valid(found)
        assert found == value or isinstance(value, str)
    assert wrong or validator.is_valid(found)


WORDS = ("type", "enum", "const", "anyOf", "allOf", "$ref", "properties", "required", "items", "nullable")
nonsense = st.recursive(
    values | st.just("#") | st.just("#/properties/a"),
    lambda inner: st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
)


@given(schema=nonsense, raw=st.text(max_size=4) | values.map(json.dumps))
def test_no_schema_raises(schema: Any, raw: str) -> None:
    Parameters(schema if isinstance(schema, dict) else {"properties": {"a": schema}}).value("a", raw)


def test_schemas_of_enemies_take_no_time() -> None:
    levels = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 4} for n in range(60)}
    many = {"$defs": {"e": {"enum": list(range(30_000))}}, "anyOf": [{"$ref": "#/$defs/e"}] * 5000}
    wide = {"allOf": [{"$ref": "#/$defs/w"}] * 5000, "$defs": {"w": {"properties": {f"p{n}": {} for n in range(5000)}}}}
    begun = time.monotonic()
    for schema in ({"$defs": levels, "$ref": "#/$defs/l0"}, many, wide, {"$ref": "#"}, {"allOf": [{"$ref": "#"}] * 9}):
        for parameters in (Parameters(schema), Parameters({**schema, "properties": {"a": schema}})):
            for raw in ("3", "[" * 5000, "[" * 500 + "]" * 500):
                parameters.value("a", raw)
    assert time.monotonic() - begun < 20
