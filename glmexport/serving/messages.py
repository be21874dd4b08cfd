"""Messages of a conversation in OpenAI's form, brought into the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmexport.serving.failure import Refused
from glmexport.serving.fields import bounded_object
from glmexport.serving.limits import ServingLimits
from glmexport.serving.names import TOOL_NAME, is_tool_name

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_COMMON = {"role", "content", "name"}
#: Keys of an assistant's message as it was answered, without a meaning here.
_DROPPED = ("refusal", "audio", "annotations", "function_call")
_MORE = {
    "assistant": {"tool_calls", "reasoning_content", "reasoning", *_DROPPED},
    "tool": {"tool_call_id"},
}


def template_messages(messages: Sequence[Mapping[str, Any]], limits: ServingLimits) -> list[dict[str, object]]:
    """Return the messages with content as text, the arguments of calls as objects, and reasoning by both of its names.

    A field that is null is none, whatever its name, as clients send every field of theirs.

    Raises:
        Refused: none or more than ``limits`` allow, an unknown role, or something that is no text.
    """
    if not 0 < len(messages) <= limits.messages:
        raise Refused(400, f"A conversation has 1 to {limits.messages} messages.", "messages")
    return [_message(message, f"messages.{at}", limits) for at, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str, limits: ServingLimits) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(400, f"{where}: role is none of {', '.join(_ROLES)}.", f"{where}.role")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(set(message) - _COMMON - _MORE.get(role, set()))
    if unknown:
        raise Refused(400, f"{where}: {unknown[0]} is not a field of this message.", f"{where}.{unknown[0]}")
    made: dict[str, object] = {"role": _ROLES[role]}
    for key, value in message.items():
        if key in _DROPPED and value:
            raise Refused(400, f"{where}: {key} is not supported.", f"{where}.{key}")
        if key == "name" and role == "tool" and not is_tool_name(value):
            raise Refused(400, f"{where}: {TOOL_NAME}.", f"{where}.name")
        if key not in (*_DROPPED, "role"):
            made[key] = _field(key, value, where, limits)
    if "reasoning" in made:
        # Other servers' name, which few templates read.
        made.setdefault("reasoning_content", made["reasoning"])
    if "content" not in made:
        if role not in ("assistant", "tool"):
            raise Refused(400, f"{where}: content is missing.", f"{where}.content")
        # Templates look at it before they look at calls; a tool may have nothing to say.
        made["content"] = ""
    return made


def _field(key: str, value: object, where: str, limits: ServingLimits) -> object:
    if key == "content":
        return _text(value, f"{where}.content")
    if key == "tool_calls":
        return _calls(value, f"{where}.tool_calls", limits)
    if not isinstance(value, str):
        raise Refused(400, f"{where}: {key} is no text.", f"{where}.{key}")
    return value


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(400, f"{where} is neither text nor parts of type text.", where)
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: object, where: str, limits: ServingLimits) -> list[dict[str, object]]:
    if not isinstance(calls, list):
        raise Refused(400, f"{where} is no array.", where)
    return [_call(call, f"{where}.{at}", limits) for at, call in enumerate(calls)]


def _call(call: object, where: str, limits: ServingLimits) -> dict[str, object]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(400, f"{where} is no call of a function.", where)
    if not is_tool_name(function["name"]):
        raise Refused(400, f"{where}: {TOOL_NAME}.", f"{where}.function.name")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        # As some write a call without arguments.
        arguments = {}
    try:
        # OpenAI's form has them as text, templates read an object.
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        read = bounded_object(text.encode(), limits)
    except ValueError as error:
        raise Refused(400, f"{where}: arguments cannot be read: {error}.", f"{where}.function.arguments") from error
    made: dict[str, object] = {"type": "function", "function": {"name": function["name"], "arguments": read}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made
