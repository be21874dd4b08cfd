"""The tokenizer, compared with transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import write_json, write_tokenizer

from glmexport.checkpoint import Tokenizer
from glmexport.errors import CheckpointError, InputError

TEMPLATE = """[gMASK]<sop>
{%- if tools %}
<|system|>{{ tools | tojson }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'stop' %}{% break %}{% endif %}
    {%- if message.role not in ('user', 'assistant') %}{{ raise_exception(message.role) }}{% endif %}
<|{{ message.role }}|>
{{ message.content }}{{ message.reasoning_content }}{{ {'ü': '<&>'} | tojson(indent=1) }}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>{{ '' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif %}
{{ eos_token }}
"""

MESSAGES: list[dict[str, object]] = [
    {"role": "user", "content": "the other Himmel, über <b>alles</b> 你好 🙂", "name": None},
    {"role": "assistant", "content": "the theory", "thinking": "hell"},
    {"role": "stop", "content": "never rendered"},
]
TOOLS = [
    {"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture
def glm(tmp_path: Path) -> Path:
    directory = write_tokenizer(tmp_path / "glm")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def reference(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


TEXTS = [
    "",
    "the theory of the other",
    "  two  spaces\n\ttab",
    "你好，世界 🙂",
    "[gMASK text < | user |> [sop]",
    "\u0000\u200b\ue000",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers_without_special_tokens_added(text: str, glm: Path) -> None:
    tokenizer = Tokenizer.open(glm)
    ids = tokenizer.encode(text)
    assert ids == reference(glm)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}])
def test_conversations_are_rendered_as_transformers_does(
    prompt: bool, variables: dict[str, Any], glm: Path
) -> None:
    tokenizer, expected = Tokenizer.open(glm), reference(glm)
    rendered = tokenizer.render(MESSAGES, add_generation_prompt=prompt, **variables)
    arguments = {"add_generation_prompt": prompt, **variables}
    assert rendered == expected.apply_chat_template(MESSAGES, tokenize=False, **arguments)
    ids = tokenizer.encode_chat(MESSAGES, add_generation_prompt=prompt, **variables)
    assert ids == expected.apply_chat_template(MESSAGES, **arguments)["input_ids"]
    assert ids[:2] == tokenizer.prefix
    assert "never rendered" not in rendered
    assert "<think>" in rendered or not prompt or variables.get("enable_thinking") is False


def test_what_a_glm_tokenizer_has(glm: Path) -> None:
    tokenizer = Tokenizer.open(glm)
    assert tokenizer.prefix == [tokenizer.special_tokens["[gMASK]"], tokenizer.special_tokens["<sop>"]]
    assert list(tokenizer.special_tokens) == [
        "[gMASK]",
        "<sop>",
        "<|user|>",
        "<|assistant|>",
        "<|endoftext|>",
    ]
    assert tokenizer.vocabulary_size == len(reference(glm)) == max(tokenizer.special_tokens.values()) + 1
    assert tokenizer.decode(tokenizer.prefix + tokenizer.encode("hell")) == "hell"
    assert [path.name for path in tokenizer.files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_the_prefix_falls_back_to_bos_and_then_to_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_tokenizer(tmp_path / "bos", glm=False))
    assert tokenizer.prefix == [tokenizer.special_tokens["<s>"]]
    assert Tokenizer.open(write_tokenizer(tmp_path / "none", glm=False, bos_token=None)).prefix == []
    (tmp_path / "none" / "tokenizer_config.json").unlink()
    assert Tokenizer.open(tmp_path / "none").prefix == []


def test_named_tokens_of_the_older_file_and_in_tables_are_understood(tmp_path: Path) -> None:
    directory = write_tokenizer(
        tmp_path, glm=False, bos_token={"content": "<s>"}, chat_template="{{ bos_token }}"
    )
    assert Tokenizer.open(directory).prefix == [Tokenizer.open(directory).control_tokens["<s>"]]
    write_tokenizer(directory, glm=False, bos_token=None, chat_template="{{ bos_token }}{{ eos_token }}")
    write_json(directory / "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "<s>"})
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.render(MESSAGES) == "<s><s>"
    assert tokenizer.render(MESSAGES) == reference(directory).apply_chat_template(MESSAGES, tokenize=False)


def test_truncation_and_padding_in_the_file_do_not_change_ids(glm: Path) -> None:
    table = json.loads((glm / "tokenizer.json").read_text(encoding="utf-8"))
    expected = Tokenizer.open(glm).encode("the theory of the other")
    table["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    table["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    write_json(glm / "tokenizer.json", table)
    assert Tokenizer.open(glm).encode("the theory of the other") == expected


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}], "listed"),
        ({"default": "table", "tool_use": "tools"}, "table"),
    ],
)
def test_a_template_in_the_configuration_is_used(configured: object, expected: str, tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, chat_template=configured)
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.has_chat_template
    assert tokenizer.render(MESSAGES) == expected
    with_tools = tokenizer.render(MESSAGES, tools=TOOLS)
    assert with_tools == reference(directory).apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False)
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.open(directory).render(MESSAGES, tools=TOOLS) == "file"


def test_further_template_files_are_used_and_carried(glm: Path) -> None:
    (glm / "additional_chat_templates").mkdir()
    (glm / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    tokenizer = Tokenizer.open(glm)
    assert tokenizer.render(MESSAGES, tools=TOOLS) == "with tools"
    assert tokenizer.files[-1] == glm / "additional_chat_templates" / "tool_use.jinja"


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        directory = write_tokenizer(tmp_path, chat_template=attack)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json failed: SecurityError"):
            Tokenizer.open(directory).render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_says_why_and_where(template: str, message: str, glm: Path) -> None:
    (glm / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        Tokenizer.open(glm).render(MESSAGES)
    assert str(glm / "chat_template.jinja") in refusal.value.message


def test_without_a_template_or_messages_nothing_is_rendered(glm: Path) -> None:
    with pytest.raises(InputError, match="The conversation is empty"):
        Tokenizer.open(glm).render([])
    (glm / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.open(glm)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match=re.escape(f"{glm} has no chat template")):
        tokenizer.encode_chat(MESSAGES)


EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer without vocabulary"),
        (json.dumps(EMPTY).encode(), "tokenizer without vocabulary"),
        (b"{}", "is not a tokenizer"),
        (b"\xff", "is not a tokenizer"),
        (b"", "is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_is_no_tokenizer_is_refused(content: bytes | None, message: str, glm: Path) -> None:
    path = glm / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Tokenizer.open(glm)
    assert str(glm) in refusal.value.message
    assert "tokenizer.json" in refusal.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 3}, "chat_template is neither a text nor texts by name"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is neither a text nor texts by name"),
        ({"chat_template": ["x"]}, "chat_template is neither a text nor texts by name"),
        (
            {"added_tokens_decoder": {"3": {"content": "<sop>"}}},
            "gives '<sop>' the id 3, and tokenizer.json does not",
        ),
        ({"added_tokens_decoder": {"900": {"content": "<new>"}}}, "gives '<new>' the id 900"),
        ({"added_tokens_decoder": {"900": 1}}, "gives None the id 900"),
    ],
)
def test_a_configuration_that_disagrees_is_refused(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    directory = write_tokenizer(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Tokenizer.open(directory)
    assert str(directory / "tokenizer_config.json") in refusal.value.message


def test_a_bos_token_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, glm=False, bos_token="<bos>")
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: bos_token is '<bos>', which tokenizer\.json does not"
    ):
        Tokenizer.open(directory)


def test_a_template_that_is_not_text_is_refused(glm: Path) -> None:
    (glm / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.open(glm)
