"""Fields of a request: those that are read, those that change nothing, and those that are refused as they would.

A field that this server does not know, or cannot heed, is refused where it could change the answer: a client would
otherwise take an answer for one that it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from glmexport.foundation.files import json_object
from glmexport.serving.failure import Refused
from glmexport.serving.limits import ServingLimits
from glmexport.serving.names import TOOL_NAME, is_tool_name

#: Fields of the client's own bookkeeping, which nobody reads.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
#: Values with which a field changes nothing; with any other, it is refused.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "top_k": (0, -1),
}
#: Below this, sampling differs from taking the most likely token in nothing but overflows.
_COLDEST = 1e-4
#: Separators of values in JSON, and texts; also a text that is not closed, so that nothing is looked at twice.
_STRUCTURE = re.compile(rb'[\[{,]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class _Fields(BaseModel):
    """Fields of which none is unknown: the first such ends the reading, as a million others would take long to list."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, given: Any) -> Any:
        names = {field.alias or name for name, field in cls.model_fields.items()}
        if isinstance(given, dict) and (unknown := next((name for name in given if name not in names), None)):
            raise PydanticCustomError("extra_forbidden", "unknown field", {"name": unknown})
        return given


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _one_prompt(given: object) -> str | list[int]:
    """A text or token ids, or a list of one of these; of a wrong list no more is read than its first wrong item."""
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        if len(given) > 1:
            raise PydanticCustomError("unsupported_value", "One prompt a request is answered")
        (given,) = given
    if isinstance(given, str):
        return given
    # A bool is an int in Python, and no token.
    if isinstance(given, list) and all(type(token) is int for token in given):
        return given
    raise PydanticCustomError("prompt_type", "A prompt is a text or a list of token ids")


class StreamOptions(_Fields):
    """Options of a stream beside its text."""

    include_usage: bool = False
    #: Padding against the sizes of packets, which this server never adds.
    include_obfuscation: bool = False


class CompletionRequest(_Fields):
    """The fields that both kinds of requests have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Annotated[list[str], FailFast(), BeforeValidator(_listed)] = []
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def warmth(self) -> float:
        """The temperature; 0 for the most likely token."""
        return self.temperature if self.temperature > _COLDEST else 0

    def stops(self, limits: ServingLimits) -> tuple[str, ...]:
        """Return the stop strings.

        Raises:
            Refused: too many, too long, or an empty one.
        """
        stops = tuple(self.stop)
        if len(stops) > limits.stops or any(not 0 < len(stop) <= limits.stop_characters for stop in stops):
            raise Refused(
                400,
                f"At most {limits.stops} stop strings are taken, each of 1 to {limits.stop_characters} characters.",
                "stop",
            )
        return stops


def _tool_name(given: object) -> str:
    if not isinstance(given, str) or not is_tool_name(given):
        raise PydanticCustomError("tool_name", TOOL_NAME)
    return given


ToolName = Annotated[str, PlainValidator(_tool_name)]


class Function(_Fields):
    """The declaration of a tool."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    #: Whether arguments must follow the schema, which a free answer cannot promise.
    strict: Literal[False] | None = None


class NamedFunction(_Fields):
    """The name of a tool."""

    name: ToolName


class NamedTool(_Fields):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Tool(_Fields):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class JsonSchema(_Fields):
    """The schema of an answer."""

    name: str = ""
    description: str | None = None
    #: Answers follow the schema in any case.
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Fields):
    """The required form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self


class TemplateSettings(_Fields):
    """Variables of the chat template that a request may set."""

    enable_thinking: bool | None = None
    #: Whether the reasoning of earlier turns is left out; templates of GLM-4.7 and 5.2 read it.
    clear_thinking: bool | None = None


class ChatRequest(CompletionRequest):
    """The body of a request to /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], FailFast()]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateSettings = TemplateSettings()
    clear_thinking: bool | None = None


class TextRequest(CompletionRequest):
    """The body of a request to /v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_one_prompt)]
    logprobs: int | None = Field(default=None, ge=0)
    return_token_ids: bool = False


T = TypeVar("T", bound=CompletionRequest)


def read_body(data: bytes, model: type[T], limits: ServingLimits) -> T:
    """Return the request in a body.

    Raises:
        Refused: no JSON object, nested beyond reason, of too many values, or with a field that is wrong, unknown or
            cannot be heeded. What that costs is bounded by the size of the body: the first error ends the reading.
    """
    try:
        given = bounded_object(data, limits, limits.prompt_ids if "prompt" in model.model_fields else 0)
    except ValueError as error:
        raise Refused(400, f"The body cannot be read: {error}.", code="invalid_json") from error
    # Of a prompt's list, the first wrong item ends the reading.
    looked_at = {name: value for name, value in given.items() if name != "prompt" or isinstance(value, str)}
    _check_size(looked_at, limits)
    try:
        # Half of a surrogate pair is no text, and NaN no number, wherever it stands.
        json.dumps(looked_at, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise Refused(400, "The body has a text or a number that is none.", code="invalid_json") from error
    fields = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name, values in NEUTRAL.items():
        if name in fields and name not in model.model_fields:
            value = fields.pop(name)
            if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
                raise Refused(400, f"{name} is not supported but as {values[0]!r}.", name, "unsupported_value")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _wrong(error) from error


def _wrong(error: ValidationError) -> Refused:
    """The first thing that is wrong, without the value, which may be long."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        where = f"{where}.{first['ctx']['name']}".removeprefix(".")
        return Refused(400, f"{where} is not a field that this server knows.", where, "unknown_parameter")
    if where.startswith("tool_choice"):
        return Refused(400, "tool_choice is auto, none, required, or a function by its name.", "tool_choice")
    if where.endswith("function.strict"):
        return Refused(400, "strict tools are not supported: no answer is forced.", where, "unsupported_value")
    return Refused(400, f"{where or 'The body'}: {first['msg']}.", where or None, first["type"])


def bounded_object(data: bytes, limits: ServingLimits, ids: int = 0) -> dict[str, object]:
    """Return the JSON object in ``data``, unless it has too many values: making them stops all other threads.

    Args:
        data: UTF-8.
        limits: how many values there may be.
        ids: how many more, which are the tokens of a prompt.

    Raises:
        Refused: there are more.
        ValueError: as ``json_object`` does.
    """
    if _exceeds(data, limits.values, ids):
        raise _too_many(limits)
    return json_object(data)


def _exceeds(data: bytes, values: int, ids: int) -> bool:
    """Whether JSON has more arrays and objects, texts or commas than so many values and ``ids`` may have."""
    if data.count(b"[") + data.count(b"{") <= values and data.count(b",") <= values + ids:
        return False
    # Some may be within texts. One by one, so that other threads run, and no further than there may be.
    containers = commas = texts = 0
    for found in _STRUCTURE.finditer(data):
        byte = found[0]
        containers += byte in (b"[", b"{")
        commas += byte == b","
        texts += len(byte) > 1
        if containers > values or commas > values + ids or texts > 2 * values:
            return True
    return False


def _too_many(limits: ServingLimits) -> Refused:
    return Refused(400, f"The body has more than {limits.values} values.", code="too_many_values")


def _check_size(value: object, limits: ServingLimits) -> None:
    """Raise Refused for too many levels of arrays and objects, or too many values in them; without recursion."""
    level, depth, count = [value], 0, 0
    while level:
        within: list[object] = []
        for item in level:
            inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            count += len(inner)
            if count > limits.values:
                raise _too_many(limits)
            within += inner
        depth += any(isinstance(item, (dict, list)) for item in level)
        if depth > limits.depth:
            raise Refused(400, f"The body has more than {limits.depth} levels.", code="invalid_json")
        level = within
