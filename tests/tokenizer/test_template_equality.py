"""Conversations rendered by jinja2 alone are those of transformers, whatever is said in them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import scripted
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from glmexport.demo import demo_checkpoint
from glmexport.tokenizer.template_process import environment, render

#: Everything that an environment for chat templates offers, in the ways that GLM's use it.
EVERYTHING = """[gMASK]<sop>
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort in ['low', 'high'] else 'max' %}
{%- set clear_thinking = clear_thinking if clear_thinking is defined else false %}
<|system|>{{ effort | capitalize }}{{ bos_token }}{{ unknown }}
{% macro shown(content) -%}
    {%- if content is string %}{{ content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {%- if part is mapping and part.type == 'text' %}{{ part.text }}
            {%- elif part is string %}{{ part }}{% endif %}
        {%- endfor %}
    {%- else %}{{ content }}{% endif %}
{%- endmacro %}
    {% if tools %}
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{{ tool | tojson(indent=2, sort_keys=True) }}{{ tool | tojson(ensure_ascii=True, separators=(',', ':')) }}
{% for key, value in (tool.function or tool).items() if key != 'strict' %}{{ key }}={{ value | tojson }};{% endfor %}
    {% endfor %}
{% endif %}
{%- for document in documents or [] %}<document>{{ document.title }}: {{ document['text'] | trim }}{% endfor %}
{%- set ns = namespace(last=-1, seen=dict(a=1)) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% continue %}{% endif %}
{%- if loop.index0 > 20 %}{% break %}{% endif %}
{%- set content = shown(m.content) %}
{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
<|{{ m['role'] }}|>{{ m.thinking }}
{% generation %}{% if reasoning and (not clear_thinking or loop.index0 > ns.last) %}<think>{{ reasoning.strip() }}
{% endif %}{{ content | e }}{% set content = 'inside' %}{% endgeneration %}{{ content }}
{%- for call in m.tool_calls or [] %}
{%- set call = call.function or call %}
<tool_call>{{ call.name }}
{% if call.arguments is mapping %}{% for k, v in call.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}{% else %}{{ call.arguments }}{% endif %}</tool_call>
{%- endfor %}
{%- if m.role == 'tool' and (loop.first or messages[loop.index0 - 1].role != 'tool') %}<|observation|>{% endif %}
{%- if m.role == 'observation' %}{{ raise_exception('No ' ~ m.role ~ ' here.') }}{% endif %}
{%- endfor %}
{{- strftime_now('%Y')|length }}{{ dict.fromkeys(['x'], messages | length) | tojson }}
{%- if add_generation_prompt %}<|assistant|>{{ '<think></think>' if enable_thinking is false else '' }}{% endif %}
"""
TEMPLATES = {
    "demo": (demo_checkpoint() / "chat_template.jinja").read_text(encoding="utf-8"),
    "mixture": Path("benchmarks/moe_checkpoint/checkpoint/chat_template.jinja").read_text(encoding="utf-8"),
    "models": models.TEMPLATE,
    "scripted": scripted.TEMPLATE,
    "everything": EVERYTHING,
}
#: Programs that are refused, and by the same words.
REFUSED = [
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ dict.__class__ }}",
    "{{ dict['__base__'] }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(self=1).self }}{{ namespace.__init__.__globals__ }}",
    "{{ messages[9].x }}",
    "{% for x in 1 %}{% endfor %}",
    "{% for x in messages %}",
    "{{ x | nofilter }}",
    "{% include 'x' %}",
    "{{ tojson }}{{ {1: 2} | tojson(indent='x') }}{{ cycler | tojson }}",
]

SETTINGS = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape", "undefined", "optimized")

TEXT = st.text(max_size=12) | st.sampled_from(
    ["<think>\na\n</think>\n\nb", " 中文 😀\u200d ", "<b>&\"'</b>", "{{ 1 }}\n"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def table(optional: dict[str, st.SearchStrategy[Any]], **required: st.SearchStrategy[Any]) -> Any:
    return st.fixed_dictionaries(required, optional=optional)


ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=3) | TEXT
FUNCTION = table({"parameters": JSON, "strict": st.booleans(), "description": TEXT}, name=TEXT)
CALL = table({"id": TEXT}, function=table({}, name=TEXT, arguments=ARGUMENTS)) | table(
    {}, name=TEXT, arguments=ARGUMENTS
)
PARTS = st.lists(TEXT | table({"type": st.just("text")}, text=TEXT) | table({}, output=JSON), max_size=3)
MESSAGE = table(
    {
        "content": TEXT | PARTS | st.none(),
        "reasoning_content": TEXT | st.none(),
        "thinking": TEXT,
        "reasoning": TEXT | st.none(),
        "tool_calls": st.lists(CALL, max_size=2),
        "tool_call_id": TEXT,
    },
    role=st.sampled_from(["system", "user", "assistant", "tool", "observation"]),
)
VARIABLES = table(
    {
        "tools": st.none() | st.lists(FUNCTION | table({}, type=st.just("function"), function=FUNCTION), max_size=2),
        "documents": st.none() | st.lists(table({}, title=TEXT, text=TEXT), max_size=2) | st.lists(JSON, max_size=1),
        "add_generation_prompt": st.booleans(),
        "enable_thinking": st.booleans(),
        "clear_thinking": st.booleans(),
        "reasoning_effort": st.sampled_from(["low", "high", "none"]),
        "bos_token": TEXT,
    }
)


def both(template: str, messages: list[Any], variables: dict[str, Any]) -> tuple[str, str]:
    """Return what transformers and the project make of a conversation: a text, or an error in words."""

    def theirs() -> str:
        rendered, _ = render_jinja_template(conversations=[messages], chat_template=template, **variables)
        return str(rendered[0])

    def ours() -> str:
        return render({"template": template, "messages": messages, "variables": variables})

    said = []
    for write in (theirs, ours):
        try:
            said.append(write())
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said[0], said[1]


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.lists(MESSAGE, min_size=1, max_size=5), VARIABLES)
@settings(max_examples=150, deadline=None)
def test_any_conversation(name: str, messages: list[Any], variables: dict[str, Any]) -> None:
    theirs, ours = both(TEMPLATES[name], messages, variables)
    assert ours == theirs


@given(JSON, JSON)
def test_tools_and_documents_that_are_none(tools: Any, documents: Any) -> None:
    """They are refused where transformers refuses them; its words for tools are about functions of Python."""
    variables = {"tools": tools, "documents": documents}
    theirs, ours = both("{{ tools }}{{ documents }}", [{"role": "user"}], variables)
    if theirs.startswith("ValueError: Tools should"):
        assert ours.startswith("ValueError: Tools should")
    else:
        assert ours == theirs


@pytest.mark.parametrize("template", REFUSED)
def test_what_is_refused(template: str) -> None:
    theirs, ours = both(template, [{"role": "user", "content": "a"}], {})
    assert ours == theirs


def test_most_random_conversations_are_rendered() -> None:
    """So that the comparison is not one of errors."""
    texts = 0

    @given(st.lists(MESSAGE, min_size=1, max_size=5), VARIABLES)
    @settings(max_examples=60, deadline=None, database=None)
    def count(messages: list[Any], variables: dict[str, Any]) -> None:
        nonlocal texts
        texts += both(TEMPLATES["scripted"], messages, variables)[1].startswith("[gMASK]")

    count()
    assert texts > 20


def test_the_date_is_that_of_transformers() -> None:
    form = "%Y-%m-%d %H"
    before = datetime.now().strftime(form)
    theirs, ours = both("{{ strftime_now('" + form + "') }}", [], {})
    assert before <= ours <= datetime.now().strftime(form) and theirs[:10] <= ours


def names(found: jinja2.Environment) -> Iterable[set[str]]:
    """Return what a template can name, and what it is parsed with."""
    yield set(found.globals)
    yield set(found.filters)
    yield set(found.tests)
    yield {tag for extension in found.extensions.values() for tag in extension.tags}
    yield {
        f"{name}={getattr(found, name)}" for name in ("trim_blocks", "lstrip_blocks", "autoescape", "undefined")
    }


def test_the_environment_has_what_that_of_transformers_has() -> None:
    theirs = chat_template_utils._compile_jinja_template("").environment
    assert [*names(environment())] == [*names(theirs)]
