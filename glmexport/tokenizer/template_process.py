"""The process in which chat templates run, with limits of time and memory: they are programs of the checkpoint's.

Run as a file, with nothing of glmexport. Its arguments are the CPU seconds and the bytes of memory that a conversation
may take. Reads requests from stdin, a JSON line each, and answers each with a line: ``{"text": ...}`` or
``{"failed": ...}``. A template that takes longer than the limit ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

#: Characters of what a conversation becomes, and of a message of an error.
_MOST_CHARACTERS, _MESSAGE = 32 << 20, 1000
#: Names of a message's reasoning, the first of which is the one that most templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _limit_memory(most: int) -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - nothing but what is needed
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + most, taken + most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        # Another system than Linux, where there is the limit of time alone.
        return


def _limit_time(seconds: int) -> None:
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
    except (ImportError, OSError, ValueError):
        return


class _Generation(Extension):
    """The tag ``generation``, which marks what the model is trained to write; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as its base has it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block: a scope of its own, as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("rendered"), [], [], body).set_lineno(line)

    def rendered(self, caller: Callable[[], str]) -> str:
        """Return the body's text."""
        return caller()


class _Namespace(Namespace):
    """The global ``namespace``, none of whose names begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As its base takes them, so that a template may call a name self.
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _refuse_hidden(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        Namespace.__setitem__(self, name, value)


def _refuse_hidden(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            "Chat templates cannot store underscore-prefixed attributes on a namespace, "
            f"but got {name!r}. Please rename the attribute."
        )


class _Dictionary:
    """The global ``dict``: makes dictionaries, and is no type by which others could be reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dictionary with one value for all keys."""
        return dict.fromkeys(*args, **kwargs)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Not jinja2's own, which writes < and > as escapes of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """Return what the templates of checkpoints are written for: the environment that transformers renders them in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dictionary(), namespace=_Namespace)
    return made


@lru_cache(8)
def _compiled(template: str) -> Template:
    return environment().from_string(template)


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has every name that templates read it by."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def render(request: dict[str, Any]) -> str:
    """Return what the template of a request makes of its messages and variables.

    The text is the one that ``apply_chat_template`` of transformers 5.23 has for the same conversation.

    Raises:
        ValueError: a tool is not a table.
        TypeError: a document is not a table.
        Exception: whatever the template raises.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **request["variables"]}
    if given["tools"] is not None:
        given["tools"] = list(given["tools"])
        if any(not isinstance(tool, dict) for tool in given["tools"]):
            raise ValueError("Tools should be JSON schemas.")
    if given["documents"] is not None and any(not isinstance(document, dict) for document in given["documents"]):
        raise TypeError("Documents should be a list of dicts with 'title' and 'text' keys!")
    messages = [_aliased(message) for message in request["messages"]]
    return _compiled(request["template"]).render(messages=messages, **given)


def _answer(request: dict[str, Any], memory: int) -> dict[str, str]:
    try:
        text = render(request)
    except MemoryError:
        return {"failed": f"it needs more than {memory >> 20} MiB of memory"}
    except Exception as error:
        # The template can raise anything.
        return {"failed": f"{type(error).__name__}: {str(error)[:_MESSAGE]}"}
    if len(text) > _MOST_CHARACTERS:
        return {"failed": f"it writes more than {_MOST_CHARACTERS:,} characters"}
    return {"text": text}


def main() -> None:
    """Answer until stdin ends."""
    seconds, memory = map(int, sys.argv[1:])
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not come between the answers.
    os.dup2(2, 1)
    # What every template needs is made before the limits, which are of what a template takes.
    render({"template": "", "messages": [], "variables": {}})
    _limit_memory(memory)
    for line in sys.stdin.buffer:
        _limit_time(seconds)
        answer = _answer(json.loads(line.decode("utf-8", "surrogatepass")), memory)
        answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
