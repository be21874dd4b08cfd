"""Messages of a conversation in OpenAI's form as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmexport.checkpoint.files import json_object
from glmexport.serving.failure import Refused

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_COMMON = {"role", "content", "name"}
#: Of an assistant's message as it was answered, without a meaning here.
_DROPPED = ("refusal", "audio", "annotations", "function_call")
_MORE = {
    "assistant": {"tool_calls", "reasoning_content", "reasoning", *_DROPPED},
    "tool": {"tool_call_id"},
}


def template_messages(messages: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, object]]:
    """The messages with content as text, the arguments of calls as objects, and reasoning by both of its names.

    A field that is null is none, whatever its name, as clients send every field of theirs.

    Raises:
        Refused: none or more than ``most``, an unknown role, or something that is no text.
    """
    if not 0 < len(messages) <= most:
        raise Refused(400, f"A conversation has 1 to {most} messages.", "messages")
    return [_message(message, f"messages.{at}") for at, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(400, f"{where}: role is none of {', '.join(_ROLES)}.", f"{where}.role")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(set(message) - _COMMON - _MORE.get(role, set()))
    if unknown:
        raise Refused(400, f"{where}: {unknown[0]} is not a field of this message.", f"{where}.{unknown[0]}")
    made: dict[str, object] = {"role": _ROLES[role]}
    for key, value in message.items():
        if key in (*_DROPPED, "role"):
            if key in _DROPPED and value:
                raise Refused(400, f"{where}: {key} is not supported.", f"{where}.{key}")
        elif key == "content":
            made[key] = _text(value, f"{where}.content")
        elif key == "tool_calls":
            made[key] = _calls(value, f"{where}.tool_calls")
        elif isinstance(value, str):
            made[key] = value
        else:
            raise Refused(400, f"{where}: {key} is no text.", f"{where}.{key}")
    if "reasoning" in made:
        # Other servers' name, which few templates read.
        made.setdefault("reasoning_content", made["reasoning"])
    if "content" not in made:
        if role not in ("assistant", "tool"):
            raise Refused(400, f"{where}: content is missing.", f"{where}.content")
        # Templates look at it before they look at calls; a tool may have nothing to say.
        made["content"] = ""
    return made


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


def _calls(calls: object, where: str) -> list[dict[str, object]]:
    if not isinstance(calls, list):
        raise Refused(400, f"{where} is no array.", where)
    return [_call(call, f"{where}.{at}") for at, call in enumerate(calls)]


def _call(call: object, where: str) -> dict[str, object]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(400, f"{where} is no call of a function.", where)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        # As some write a call without arguments.
        arguments = {}
    try:
        # OpenAI's form has them as text, templates read an object.
        read = json_object((arguments if isinstance(arguments, str) else json.dumps(arguments)).encode())
    except ValueError as error:
        raise Refused(400, f"{where}: arguments cannot be read: {error}.", f"{where}.function.arguments") from error
    made: dict[str, object] = {"type": "function", "function": {"name": function["name"], "arguments": read}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made
