"""Train the byte-level BPE tokenizer of the demo checkpoint, in the form of the GLM-4 tokenizers.

Run from the repository root: `python -m benchmarks.demo_checkpoint.tokenizer --text DIR --out DIR`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.demo_checkpoint.split import Split, make_split

VOCABULARY = 8192
CONTEXT = 2048
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
# As in GLM-4.5, these are single tokens that decoding keeps, since a client has to see them.
MARKUP = (
    "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT_CHARACTERS = 400_000  # per language, so that no language fills the vocabulary
DECLARATION_REPEATS = 3  # without it the scripts that only the declaration has would get hardly any merge
CHAT_TEMPLATE = """[gMASK]<sop>
{%- if tools %}<|system|>
# Tools
{%- for tool in tools %}

{{ tool | tojson }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}<|system|>
{{ message['content'] }}
{%- elif message['role'] == 'user' %}<|user|>
{{ message['content'] }}
{%- elif message['role'] == 'assistant' %}<|assistant|>
{{ message['content'] }}
{%- elif message['role'] == 'tool' %}<|observation|>
{{ message['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""


def sample(split: Split) -> Iterator[str]:
    """Yield training text with the same number of characters per language, twice that for English."""
    for language, texts in split.text.items():
        limit = TEXT_CHARACTERS * (2 if language == "en" else 1)
        size = 0
        for text in texts[:: max(1, sum(map(len, texts)) // limit)]:
            if size > limit:
                break
            size += len(text)
            yield text
    for texts in split.declaration.values():
        for text in texts:
            yield from [text] * DECLARATION_REPEATS


def build(split: Split) -> Tokenizer:
    """Train the tokenizer: exactly `VOCABULARY` entries, the added tokens last as in GLM-4."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKUP),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(split), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    prefix = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B", special_tokens=prefix
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"{tokenizer.get_vocab_size()} entries, expected {VOCABULARY}")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """Return the contents of tokenizer_config.json."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token in (*SPECIAL, *MARKUP)
    }
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    text = json.dumps(tokenizer_config(tokenizer), ensure_ascii=False, indent=2)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with python-docs/ and udhr/")
    parser.add_argument("--out", type=Path, default=Path("glmexport/demo/checkpoint"))
    arguments = parser.parse_args()
    split = make_split(arguments.text)
    tokenizer = build(split)
    save(tokenizer, arguments.out)
    for (language, held), documents in sorted(split.held.items()):
        if held == "calibration":
            text = "\n".join(document.text for document in documents)
            count = len(tokenizer.encode(text).ids)
            print(f"{language}: {len(text.encode()) / count:.2f} bytes per token")


if __name__ == "__main__":
    main()
