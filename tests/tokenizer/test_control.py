"""Control tokens: what a template writes holds, what a person writes is text; other text is as transformers has it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import write_tokenizer
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from glmexport.tokenizer.control import ControlTokens, MarkedTokenizer, Rendered
from glmexport.tokenizer.tokenizer import Tokenizer

SPECIAL = ("<|system|>", "<|observation|>", "/nothink")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
#: Added tokens that people may write, some of which are in a tag of the template's.
WORDS = ("Paracetamol", " a/b", "/thi", "/usr", "think", "m.role")
#: As GLM-4.5's and 4.7's are written: reasoning read out of the content, calls by their parts, results, JSON.
READING = """[gMASK]<sop>
{%- if tools %}<|system|>
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}
{%- macro visible(content) -%}
{%- if content is string %}{{ content }}
{%- elif content is iterable %}{% for item in content %}{{ item.text if item is mapping else item }}{% endfor %}
{%- else %}{{ content }}{% endif %}{%- endmacro -%}
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink') }}
{%- elif m.role == 'assistant' %}<|assistant|>
{%- set reasoning, content = '', visible(m.content) %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
<think>{{ reasoning.strip() }}</think>
{{ content.strip() }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.name }}
{% for k, v in call.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' %}<|observation|>
<tool_response>{{ visible(m.content) }}</tool_response>
{%- else %}<|{{ m.role }}|>
{{ visible(m.content) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"""
PLAIN = """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{{ documents | tojson(ensure_ascii=True, indent=1) if documents }}"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with GLM-4.5's control tokens, and with added tokens that are words."""
    directory = write_tokenizer(tmp_path_factory.mktemp("control"))
    library = Library.from_file(str(directory / "tokenizer.json"))
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    library.add_tokens([AddedToken(text, normalized=False) for text in (*TAGS, "<tool_response>", "</tool_response>")])
    library.add_tokens([AddedToken(text, normalized=False) for text in WORDS])
    library.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(READING, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.open(directory)


@pytest.fixture(scope="module")
def original(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def control(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Texts of the control tokens among ``ids``."""
    names = {id_: text for text, id_ in tokenizer.control_tokens.items()}
    return [names[id_] for id_ in ids if id_ in names]


def test_what_is_a_control_token(tokenizer: Tokenizer) -> None:
    found = set(tokenizer.control_tokens)
    assert found > {*SPECIAL, *TAGS, "[gMASK]", "<sop>", "<|user|>"} and not found & {*WORDS}


NAMES = ("<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "</think>", "<tool_call>", "/nothink", "<arg_key>")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_writes_no_control_token(tokenizer: Tokenizer, name: str) -> None:
    text = f"the {name} Paracetamol{name}{name} theory"
    ids = tokenizer.encode(text)
    assert not control(tokenizer, ids) and tokenizer.decode(ids, skip_special=False) == text
    assert len(ids) < len(text.encode()), "words are merged as ever"
    assert control(tokenizer, tokenizer.encode(tokenizer.written(name))) == [name]


def messages(text: str) -> list[dict[str, Any]]:
    """``text`` wherever a request can put one."""
    call = {"name": f"f{text}", "arguments": {f"k{text}": text, "n": [{text: 1}]}}
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": f"{text}?"}]},
        {"role": "assistant", "content": f"x{text}", "reasoning_content": f"y{text}", "tool_calls": [call]},
        {"role": "tool", "content": text},
        {"role": "user", "content": f"z{text}"},
    ]


def tools(text: str) -> list[dict[str, Any]]:
    return [{"name": "f", "description": text, "parameters": {"properties": {text: {"enum": [text]}}}}]


@pytest.mark.parametrize("name", [*NAMES, "<|user|>\n<|assistant|>", "</think><|user|>", "[gMASK]<sop>"])
def test_a_conversation_has_the_control_tokens_of_its_template(tokenizer: Tokenizer, name: str) -> None:
    """The same ones whatever is said in it, and what is said comes back."""
    settings: dict[str, Any] = {"add_generation_prompt": True}
    ids, plain = (
        tokenizer.encode_chat(messages(text), tools=tools(text), **settings) for text in (name, "a harmless word")
    )
    assert control(tokenizer, ids) == control(tokenizer, plain)
    text = tokenizer.decode(ids, skip_special=False)
    assert text == tokenizer.render(messages(name), tools=tools(name), **settings)
    assert text.count(name) >= 10


words = st.lists(
    st.sampled_from(["the theory", "<", "[", "/", "[gMASK", "|user|>", "<b>", " ", "\n", "你好", "\ue000", "\\ue000"])
    | st.text(max_size=4),
    max_size=6,
).map("".join)


@given(text=words, thinking=st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]))
@example(text="a <", thinking={})
@example(text="src/", thinking={"enable_thinking": False})
def test_ids_are_those_of_transformers_without_such_names(
    tokenizer: Tokenizer, original: Any, text: str, thinking: dict[str, Any]
) -> None:
    reasoned = [*messages(text), {"role": "assistant", "content": f"<think>\n{text}a</think>\n\n{text}"}]
    asked = {"tools": tools(text), "add_generation_prompt": True, **thinking}
    # Two parts of a message make a name together.
    assume(not tokenizer.names_control([text * 2, messages(text)]))
    for conversation in (messages(text), reasoned):
        expected = original.apply_chat_template(conversation, return_dict=False, **asked)
        assert tokenizer.encode_chat(conversation, **asked) == expected
    assert tokenizer.encode(text) == original(text, add_special_tokens=False)["input_ids"]


@given(text=st.lists(st.sampled_from([*NAMES, " ", "the", "你", "e\u0301", "\n"]) | st.text(max_size=3)).map("".join))
def test_with_all_of_its_names_held_a_text_is_as_the_library_has_it(text: str) -> None:
    """By the way that is taken where some are not: spaces that tokens take along, forms of characters, and merges."""
    library = Library(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    library.pre_tokenizer, library.normalizer = pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFC()
    library.add_special_tokens([AddedToken(name, lstrip=True, rstrip=True, normalized=False) for name in NAMES[:4]])
    library.add_tokens([AddedToken("the", normalized=True), *(AddedToken(name) for name in NAMES[4:])])
    tokens = ControlTokens(library, [READING])
    held = tokens.written(text)
    expected = library.encode(text, add_special_tokens=False).ids
    assert MarkedTokenizer(library, tokens.ids).encode(text, held.control) == tokens.encode(held) == expected
    assert not {*tokens.encode(text)} & {*tokens.ids.values()}


def test_texts_that_together_make_a_name_make_no_token(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": text} for text in ("<|assis", "tant|>", "<|user", "|>")]
    ids = tokenizer.encode_chat([{"role": "user", "content": parts}])
    assert control(tokenizer, ids) == ["[gMASK]", "<sop>", "<|user|>"]
    assert tokenizer.decode(ids, skip_special=False).endswith("<|assistant|><|user|>")


def test_an_answer_may_begin_with_one_reasoning(tokenizer: Tokenizer, original: Any) -> None:
    def shown(content: str, role: str = "assistant") -> list[str]:
        return control(tokenizer, tokenizer.encode_chat([{"role": role, "content": content}]))

    begun = ["[gMASK]", "<sop>", "<|assistant|>", "<think>", "</think>"]
    for content in ("<think>a</think>b", "\n<think>\na\n</think>\nb", "a</think>b", "b"):
        conversation = [{"role": "assistant", "content": content}]
        expected = original.apply_chat_template(conversation, return_dict=False)
        assert shown(content) == begun and tokenizer.encode_chat(conversation) == expected
    assert shown("<think>a</think>b <think>c</think><tool_call>") == begun
    assert shown("<think>a</think>b", "user") == ["[gMASK]", "<sop>", "<|user|>"]
    assert shown("<think>a</think>", "tool")[3:] == ["<tool_response>", "</tool_response>"]


def test_json_in_ascii_and_roles_in_a_name(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    tokenizer = Tokenizer.open(tmp_path)
    rendered = tokenizer.render([{"role": "user", "content": "é<|user|>"}], documents=[{"é": "<|user|>\\ue000"}])
    assert rendered.endswith('<|user|>\né<|user|>[\n {\n  "\\u00e9": "<|user|>\\\\ue000"\n }\n]')
    assert control(tokenizer, tokenizer.encode(rendered)) == ["[gMASK]", "<sop>", "<|user|>"]


def test_a_prefix_that_is_written_out_is_not_put_in_again(tokenizer: Tokenizer) -> None:
    expected = [*tokenizer.prefix, *tokenizer.encode("Hello")]
    for text in ("Hello", "[gMASK]<sop>Hello", tokenizer.written("[gMASK]<sop>Hello")):
        assert tokenizer.sequence(text) == tokenizer.sequence(text, judged=True) == expected
    assert control(tokenizer, tokenizer.sequence("[gMASK]<sop>[gMASK]<sop><|user|>")) == ["[gMASK]", "<sop>"]
    assert control(tokenizer, tokenizer.sequence(" [gMASK]<sop>")) == ["[gMASK]", "<sop>"]
    assert tokenizer.sequence("") == tokenizer.sequence("[gMASK]<sop>") == tokenizer.prefix


@pytest.mark.parametrize("bos", ["<s>", None])
def test_prefixes_of_other_tokenizers(tmp_path: Path, bos: str | None) -> None:
    tokenizer = Tokenizer.open(write_tokenizer(tmp_path, glm=False, bos_token=bos))
    hell = tokenizer.encode("hell")
    assert tokenizer.sequence("hell") == [*tokenizer.prefix, *hell]
    assert tokenizer.sequence("hell", judged=True) == [*(tokenizer.prefix or [0]), *hell]
    again = tokenizer.sequence("<s>hell")
    assert again == ([*tokenizer.prefix, *hell] if bos else tokenizer.encode("<s>hell"))
    assert (tokenizer.control_tokens["<s>"] in again) == bool(bos)


def test_rendered_text_knows_its_control_tokens(tokenizer: Tokenizer) -> None:
    rendered = tokenizer.render([{"role": "user", "content": "<sop> "}])
    for same in (copy.deepcopy(rendered), pickle.loads(pickle.dumps(rendered)), rendered.until(len(rendered))):
        assert same == rendered and same.control == rendered.control
    whole = "<sop>" + rendered + "<sop>" + tokenizer.written("<sop>")
    assert control(tokenizer, tokenizer.encode(whole)) == ["[gMASK]", "<sop>", "<|user|>", "<sop>"]
    assert isinstance(rendered.rstrip(), Rendered) and rendered.rstrip().control == rendered.control
    assert not rendered.until(3).control and not control(tokenizer, tokenizer.encode(str(rendered)))
