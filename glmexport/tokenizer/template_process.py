"""The process in which chat templates run, with limits of time and memory: they are programs of the checkpoint's.

Run as a file, with nothing of glmexport. Reads requests from stdin, a JSON line each, and answers each with a line:
``{"text": ...}`` or ``{"failed": ...}``. A template that takes longer than the limit ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

#: CPU seconds and bytes of memory for one conversation, characters of what it becomes, and of a message of an error.
CPU_S, MEMORY_BYTES, MOST_CHARACTERS, _MESSAGE = 3, 1 << 29, 32 << 20, 1000


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - nothing but what is needed
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        # Another system than Linux, where there is the limit of time alone.
        return


def _limit_time() -> None:
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + CPU_S, hard))
    except (ImportError, OSError, ValueError):
        return


def _answer(request: dict[str, Any]) -> dict[str, str]:
    # Its sandbox, filters and aliases are the reference, and they change from version to version.
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[request["messages"]], chat_template=request["template"], **request["variables"]
        )
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        # The template can raise anything.
        return {"failed": f"{type(error).__name__}: {str(error)[:_MESSAGE]}"}
    if len(rendered[0]) > MOST_CHARACTERS:
        return {"failed": f"it writes more than {MOST_CHARACTERS:,} characters"}
    return {"text": str(rendered[0])}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not come between the answers.
    os.dup2(2, 1)
    # Imported before the limits, which are of what a template takes.
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template(conversations=[[]], chat_template="")
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time()
        answer = _answer(json.loads(line.decode("utf-8", "surrogatepass")))
        answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
