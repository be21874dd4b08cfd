"""A checkpoint that says what a test needs: a random one in which some tokens have but one that can follow.

What the conversation's last character is, the template writes again behind ``<|assistant|>``, and by it the model
goes: each cue of ``SCRIPTS`` begins a chain of tokens of its own. Any other character begins what random weights say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import write_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

#: As GLM-4.5's, but for the cue.
TEMPLATE = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}For each call, write <tool_call>{function-name}
<arg_key>{arg-key}</arg_key>
<arg_value>{arg-value}</arg_value>
</tool_call>
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>
{{ m.content }}{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for k, v in call.function.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>
{% endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}<|observation|>
<tool_response>{{ m.content }}</tool_response>
{%- elif m.role == 'system' -%}<|system|>
{{ m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{{- '<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{{ messages[-1].content[-1:] -}}
{%- endif -%}"""

WEATHER = """<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Zurich {"a": 1}</arg_value>
<arg_key>days</arg_key>
<arg_value>3</arg_value>
</tool_call>"""
#: What follows on each cue, in pieces where it matters. Behind ``…`` the same is said again, without an end.
SCRIPTS: dict[str, Any] = {
    "!": "Good morning, dear world. 你好!",
    "?": "<think>\nWhat do I know?</think>\nNothing.",
    "#": f"<think>I ask.</think>{WEATHER}",
    "+": f"<think>Two: {WEATHER}<tool_call>now</tool_call> enough</think>Done.",
    "%": "<tool_call>get_weather<arg_key>city<arg_value>Bern</arg_value></tool_call>",
    "~": "On and on and then again, …",
    "^": ("<tool_call>now", "\n</tool_call>"),
    "&": "STOP is said here, not there, then STOP, and more.",
}
_SIZE = 256
#: The vocabulary, with a row for every byte, special token and piece of a script.
ROWS = 400
#: An embedding so long that what layers add to it turns it by little.
_LENGTH = 2000.0


def write_scripted(directory: Path, model_type: str = "glm4", **changes: Any) -> None:
    """The checkpoint."""
    settings = {"num_hidden_layers": 2, "hidden_size": _SIZE, "max_position_embeddings": 4096, **changes}
    write_checkpoint(directory, model_type, vocab_size=ROWS, **settings)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|system|>"])
    chains = _chains()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for chain in chains.values() for text in chain])
    assert 0.9 * ROWS < tokenizer.get_vocab_size() <= ROWS
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    end = json.loads((directory / "config.json").read_text(encoding="utf-8"))["eos_token_id"][0]
    tensors = load_file(directory / "model.safetensors")
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    for cue, chain in chains.items():
        ids = [*tokenizer.encode(cue).ids, *(tokenizer.token_to_id(text) for text in chain)]
        for token, following in zip(ids, [*ids[1:], ids[1] if SCRIPTS[cue][-1] == "…" else end], strict=True):
            direction = torch.nn.functional.normalize(torch.randn(_SIZE, generator=generator), dim=0)
            embedding[token] = (direction * _LENGTH).to(embedding.dtype)
            head[following] += (direction * 1.2).to(head.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _chains() -> dict[str, list[str]]:
    """Every script in pieces, none of which is in another place, too: each has but one that follows on it."""
    used: set[str] = set()
    chains = {}
    for cue, script in SCRIPTS.items():
        if isinstance(script, tuple):
            chains[cue] = [*script]
            continue
        left, chains[cue] = script.removesuffix("…"), list[str]()
        while left:
            size = next(size for size in range(4, 40) if left[:size] not in used and len(left) - size not in (1, 2, 3))
            used.add(left[:size])
            chains[cue].append(left[:size])
            left = left[size:]
    return chains
