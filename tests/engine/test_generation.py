"""What onnxruntime-genai generates from a bundle is what the bundle's graph computes, token for token."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builds import THREADS, Run, Sample, carried, session

from glmexport.assembly.genai import DEFAULT_CACHE_BYTES, default_length
from glmexport.bundle.bundle import Bundle
from glmexport.engine.generation import GenerationSession
from glmexport.engine.speculation import Speculation
from glmexport.engine.text import Piece, generate
from glmexport.foundation.errors import BundleError, InputError
from glmexport.foundation.target import open_target
from glmexport.foundation.untrusted import visible
from glmexport.tokenizer.tokenizer import Tokenizer

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog.", "你好，世界", "x" * 120]
TOKENS = 32


def greedy(bundle: Path, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """model.onnx with a growing cache: the whole prompt first, then one token at a time."""
    runtime = session(bundle, "model.onnx")
    caches = [value for value in runtime.get_inputs() if value.name.startswith("past")]
    past = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches]
    ids, length, tokens = prompt, len(prompt), []
    while len(tokens) < count:
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        feeds |= {value.name: content for value, content in zip(caches, past, strict=True)}
        logits, *past = runtime.run(carried(runtime), feeds)
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
        ids, length = [token], length + 1
    return tokens


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_the_graph(text: str, sample: Sample) -> None:
    tokenizer = Tokenizer.open(sample.bundle)
    prompt = tokenizer.prefix + tokenizer.encode(text)
    ends = set(sample.model.config.eos_token_id)
    expected = greedy(sample.bundle, prompt, TOKENS, ends)
    pieces = list(generate(Bundle.open(sample.bundle), prompt, max_tokens=TOKENS, threads=THREADS))
    assert [piece.token for piece in pieces] == expected
    assert len(expected) > 4
    shown = "".join(piece.text for piece in pieces)
    assert tokenizer.decode(expected).startswith(shown)


def test_generation_stops_at_the_end_of_the_context(sample: Sample) -> None:
    tokenizer = Tokenizer.open(sample.bundle)
    prompt = tokenizer.prefix + tokenizer.encode("y" * 249)
    assert len(prompt) == 251
    pieces = list(generate(Bundle.open(sample.bundle), prompt, max_tokens=TOKENS, threads=THREADS))
    assert len(pieces) <= 5


def test_a_prompt_that_fills_the_context_is_refused(sample: Sample) -> None:
    with pytest.raises(InputError, match="256 tokens and the context 256"):
        next(generate(Bundle.open(sample.bundle), [0] * 256, max_tokens=1, threads=THREADS))


def test_a_graph_that_cannot_be_loaded(sample: Sample, tmp_path: Path) -> None:
    for name in ("bundle.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((sample.bundle / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot load"):
        next(generate(Bundle.open(tmp_path), [0], max_tokens=1, threads=THREADS))


def test_run_prints_text_or_tokens(sample: Sample, run: Run) -> None:
    tokenizer = Tokenizer.open(sample.bundle)
    arguments = ["run", sample.bundle, "-p", "Hello", "--max-tokens", 12, "--threads", THREADS]
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    expected = greedy(sample.bundle, prompt, 12, set(sample.model.config.eos_token_id))
    document = run(*arguments, "--json")
    assert document.code == 0, document.stderr
    assert document.document["tokens"] == expected
    assert document.document["prompt_tokens"] == len(prompt)
    text = run(*arguments)
    # People see control characters spelled out; a model of noise may say any.
    assert (text.code, text.stdout) == (0, visible(document.document["text"], lines=True) + "\n")


def test_run_takes_a_system_message_or_plain_text(sample: Sample, run: Run) -> None:
    tokenizer = Tokenizer.open(sample.bundle)
    arguments = ["run", sample.bundle, "-p", "Hello", "--max-tokens", 2, "--threads", THREADS, "--json"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    spoken = run(*arguments, "--system", "Be brief.")
    assert spoken.document["prompt_tokens"] == len(tokenizer.encode_chat(messages, add_generation_prompt=True))
    for prompt in ("Hello", "[gMASK]<sop>Hello"):
        raw = run(*arguments, "--raw", "-p", prompt)
        assert raw.document["prompt_tokens"] == len(tokenizer.prefix) + len("Hello")
    written = run(*arguments, "--raw", "-p", "Hello<|user|>")
    assert written.document["prompt_tokens"] == len(tokenizer.prefix) + len("Hello<|user|>")


class Scripted:
    """onnxruntime-genai as far as ``generate`` uses it, with tokens that are known before."""

    __version__ = "scripted"

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self.Config = lambda _: SimpleNamespace(overlay=lambda _: None)
        self.Model = lambda _: None
        self.GeneratorParams = lambda _: SimpleNamespace(set_search_options=lambda **_: None)
        self.Generator = lambda *_: self
        self._next = -1

    def append_tokens(self, _: Any) -> None:
        self._next += 1

    def get_logits(self) -> np.ndarray:
        return np.eye(1, 300, self.tokens[self._next], np.float32)[None]


def stream(monkeypatch: pytest.MonkeyPatch, sample: Sample, tokens: list[int]) -> list[Piece]:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", Scripted(tokens))
    return list(generate(Bundle.open(sample.bundle), [0], max_tokens=len(tokens), threads=THREADS))


def test_a_character_comes_whole(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "é你好 🎈!"
    # One token a byte, so that every character but two is split.
    tokens = Tokenizer.open(sample.bundle).encode(text)
    assert len(tokens) == len(text.encode())
    pieces = stream(monkeypatch, sample, tokens)
    assert [piece.text for piece in pieces if piece.text] == list(text)
    assert [piece.token for piece in pieces] == tokens


def test_a_character_that_is_never_finished_is_not_shown(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokenizer.open(sample.bundle).encode("a你")[:-1]
    assert "".join(piece.text for piece in stream(monkeypatch, sample, tokens)) == "a"


def test_bytes_that_are_no_character_hold_nothing_back(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.open(sample.bundle)
    tokens = [*tokenizer.encode("a"), tokenizer.encode("你")[0], *tokenizer.encode("bc")]
    assert "".join(piece.text for piece in stream(monkeypatch, sample, tokens)) == "a\ufffdbc"


def test_end_tokens_end_and_are_not_shown(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    end = sample.model.config.eos_token_id[1]
    tokens = [*Tokenizer.open(sample.bundle).encode("ab"), end, 5]
    assert "".join(piece.text for piece in stream(monkeypatch, sample, tokens)) == "ab"


def plain(bundle: Path, tokens: int, **options: int) -> int:
    """Tokens that a program of anybody's has in the end, two of them its prompt, if the model never ends."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(bundle))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(min_length=tokens, **options)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([[257, 258]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return int(generator.token_count())


def test_a_default_length_limits_only_who_names_none(sample: Sample, tmp_path: Path) -> None:
    """The whole context is there for every loop of ours, and for a program that asks for it."""
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    path = bundle / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["search"]["max_length"] == config["model"]["context_length"] == 256
    config["search"]["max_length"] = 16
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    assert plain(bundle, 16) == 16
    assert plain(bundle, 64, max_length=64) == 64
    prompt = list(range(30))
    for speculation in (None, Speculation("lookup", 2)):
        both = (Bundle.open(each) for each in (bundle, sample.bundle))
        ours, whole = (GenerationSession.open(each, THREADS, speculation) for each in both)
        assert (found := ours.tokens(prompt, 40)) == whole.tokens(prompt, 40) and len(prompt) + len(found) > 32
    assert len(list(ours.distributions(prompt, 8))) == len(list(whole.distributions(prompt, 8))) > 0
    assert ours.together([prompt, prompt], [8, 8]) == whole.together([prompt, prompt], [8, 8])


@pytest.mark.parametrize(
    ("context", "values", "graph", "length"),
    [
        # The demo; GLM-4-9B in fp32, in half of it, and with caches of integers; a million tokens of a small model.
        (2048, 256, {}, 2048),
        (131072, 40 * 2 * 2 * 128, {}, 8192),
        (131072, 40 * 2 * 2 * 128, {"activations": "float16"}, 16384),
        (131072, 40 * 2 * 2 * 128, {"kv_cache": "int8"}, 32768),
        (131072, 40 * 2 * 2 * 128, {"kv_cache": "int4"}, 65536),
        (2**20, 1600, {}, 131072),
        # Latents as heads of one size: less than a usable length would be left.
        (202752, 47 * 2 * 20 * 256, {}, 1024),
        (512, 10**9, {}, 512),
    ],
)
def test_a_default_length_fits_into_a_small_machine(
    context: int, values: int, graph: dict[str, Any], length: int
) -> None:
    limits = open_target("x86-avx2").graph.model_copy(update=graph)
    assert default_length(context, values, limits) == length
    bits = {"float16": 16, "int8": 8, "int4": 4}.get(next(iter(graph.values()), ""), 32)
    assert length in (1024, context) or length * values * bits <= 8 * DEFAULT_CACHE_BYTES
