"""Chat templates are programs of strangers: what takes too much of anything ends in a sentence."""

from __future__ import annotations

import os
import signal
import time

import pytest

from glmexport.foundation.errors import CheckpointError
from glmexport.tokenizer import templates
from glmexport.tokenizer.templates import render_template

MESSAGES = [{"role": "user", "content": "héllo\n中文 😀 \u200d", "parts": [1, 2.5, None, True, {"a": "<b>"}]}]
HOSTILE = {
    "a range without end": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a long answer": "{{ 'a' * 4 * 10**7 }}",
    "a list of lists": "{{ ([0] * 10**9) | length }}",
    "a text that doubles": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a wide text": "{{ 'a' | center(10**10) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a power": "{{ (7 ** (10 ** 8)) % 10 }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a long message": "{{ raise_exception('a' * 10**7) }}",
    "a process": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_that_takes_too_much_is_refused(case: str) -> None:
    with pytest.raises(CheckpointError, match="The chat template of t failed") as refusal:
        render_template("t", HOSTILE[case], MESSAGES, {})
    assert len(refusal.value.message) < 2000
    # Whoever comes next is served.
    assert render_template("t", "{{ messages[0].content }}", MESSAGES, {}) == MESSAGES[0]["content"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}|{{ bos_token }}{{ tools }}{% endfor %}",
        "{{ messages[0].parts[4].a }}{{ messages[0].parts | length }}{{ add_generation_prompt }}",
        "{%- generation %}x{% endgeneration %}",
    ],
)
def test_it_renders_as_transformers_does(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"bos_token": "[gMASK]", "tools": [{"type": "function"}], "add_generation_prompt": True}
    expected, _ = render_jinja_template(conversations=[MESSAGES], chat_template=template, **variables)
    assert render_template("t", template, MESSAGES, variables) == expected[0]


def test_a_process_that_was_killed_is_started_again() -> None:
    render_template("t", "a", MESSAGES, {})
    running = templates._PROCESS._running
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert render_template("t", "b", MESSAGES, {}) == "b"


def test_a_conversation_takes_less_than_a_few_milliseconds() -> None:
    render_template("t", "{{ messages[0].content }}", MESSAGES, {})
    times = []
    for _ in range(30):
        start = time.perf_counter()
        render_template("t", "{{ messages[0].content }}", MESSAGES, {})
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01
