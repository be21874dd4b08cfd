"""The tokenizer, compared with transformers'."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import write_json, write_tokenizer

from glmexport.foundation.errors import CheckpointError, InputError
from glmexport.tokenizer.library import usable
from glmexport.tokenizer.tokenizer import Tokenizer

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


@pytest.mark.parametrize("text", [*TEXTS, "<|assistant|>" * 50, "the " * 500, "é🙂" * 300])
def test_no_text_has_fewer_tokens_than_its_length_says(text: str, glm: Path) -> None:
    tokenizer = Tokenizer.open(glm)
    fewest = tokenizer.fewest_tokens(len(text.encode()))
    assert fewest <= len(tokenizer.encode(text)) and (fewest > 0) == bool(text)


def _normalized(table: dict[str, Any]) -> None:
    table["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}


def _greedy(table: dict[str, Any]) -> None:
    table["added_tokens"][0]["rstrip"] = True


def _cut(table: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, table["pre_tokenizer"]]}


def _isolated(table: dict[str, Any]) -> None:
    _cut(table)
    table["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Isolated"


@pytest.mark.parametrize(("change", "certain"), [(_normalized, 0), (_greedy, 0), (_cut, 0), (_isolated, 1)])
def test_a_length_says_nothing_where_text_is_left_out(glm: Path, change: Any, certain: bool) -> None:
    path = glm / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    write_json(path, table)
    assert bool(Tokenizer.open(glm).fewest_tokens(10**6)) == certain


def test_other_threads_run_while_a_text_is_encoded(glm: Path) -> None:
    tokenizer, done, gaps = Tokenizer.open(glm), threading.Event(), [0.0]

    def look() -> None:
        last = time.monotonic()
        while not done.wait(0.001):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    looking = threading.Thread(target=look)
    looking.start()
    begun = time.monotonic()
    tokenizer.encode("the other Himmel, " * 100_000)
    took_s = time.monotonic() - begun
    done.set()
    looking.join()
    assert max(gaps) < max(0.5, took_s / 2)


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
    ("part", "value", "message"),
    [
        # Rust code of the library panics at these, which is no Exception.
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "is not a tokenizer: Precompiled"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "chunk size must be non-zero"),
        # And raises bare Exception for these once it is used.
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}, "unk_id"),
        (
            "model",
            {
                "type": "WordPiece",
                "unk_token": "?",
                "continuing_subword_prefix": "#",
                "max_input_chars_per_word": 9,
                "vocab": {"a": 0},
            },
            "WordPiece",
        ),
    ],
)
def test_a_tokenizer_that_its_library_gives_up_at_is_refused(
    part: str, value: dict[str, Any], message: str, glm: Path
) -> None:
    path = glm / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value, "added_tokens": []}))
    with pytest.raises(CheckpointError, match=message) as refusal:
        Tokenizer.open(glm)
    assert str(path) in refusal.value.message


def test_what_ends_a_process_is_not_taken_for_a_bad_file() -> None:
    with pytest.raises(KeyboardInterrupt), usable("a file"):
        raise KeyboardInterrupt
    with pytest.raises(MemoryError), usable("a file"):
        raise MemoryError


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


NEW = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
NAMING: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tokenizer_config.json", {"additional_special_tokens": ["<|new|>", "<|user|>"]}, ["<|new|>"]),
    ("tokenizer_config.json", {"additional_special_tokens": [{**NEW, "__type": "AddedToken"}]}, ["<|new|>"]),
    ("tokenizer_config.json", {"extra_special_tokens": ["<|new|>"]}, ["<|new|>"]),
    ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<|new|>"}}, ["<|new|>"]),
    ("tokenizer_config.json", {"model_specific_special_tokens": {"image_token": "<|new|>"}}, ["<|new|>"]),
    ("tokenizer_config.json", {"eos_token": "<|new|>"}, ["<|new|>"]),
    ("tokenizer_config.json", {"pad_token": "<|new|>", "unk_token": "<|other|>"}, ["<|new|>", "<|other|>"]),
    ("special_tokens_map.json", {"additional_special_tokens": ["<|new|>"]}, ["<|new|>"]),
    ("special_tokens_map.json", {"eos_token": {**NEW}}, ["<|new|>"]),
    ("added_tokens.json", {"<|new|>": 400}, ["<|new|>"]),
    ("tokenizer_config.json", {"additional_special_tokens": ["<|user|>"], "pad_token": None}, []),
    ("added_tokens.json", {"<|user|>": 282}, []),
]


@pytest.mark.parametrize(("name", "table", "missing"), NAMING, ids=str)
def test_tokens_that_only_a_configuration_names_are_told(
    name: str, table: dict[str, Any], missing: list[str], tmp_path: Path
) -> None:
    """transformers appends them to the vocabulary."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    path = tmp_path / name
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, before | table)
    ours, theirs = Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(ours.unlisted) == sorted(missing)
    assert len(theirs) == ours.vocabulary_size + len(missing)
    assert (ours.remark is None) == (not missing)
    for token in missing:
        assert token in str(ours.remark) and str(ours.vocabulary_size) in str(ours.remark)
        assert theirs.convert_tokens_to_ids(token) >= ours.vocabulary_size
