"""Greedy generation from a bundle through onnxruntime-genai, one token at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glmexport.checkpoint import Tokenizer
from glmexport.errors import BundleError, InputError


@dataclass(frozen=True)
class Piece:
    """A generated token and the text that became certain with it; a character split over tokens comes with the last."""

    token: int
    text: str


def generate(
    bundle: Path, tokenizer: Tokenizer, prompt: Sequence[int], *, max_tokens: int, threads: int
) -> Iterator[Piece]:
    """Tokens after ``prompt`` until an end token, ``max_tokens`` or the context's end; end tokens are not yielded.

    Raises:
        BundleError: onnxruntime-genai cannot load the bundle.
        InputError: the prompt fills the context.
    """
    import onnxruntime_genai

    config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]
    ends = set(config["eos_token_id"])
    if len(prompt) >= config["context_length"]:
        raise InputError(
            f"The prompt has {len(prompt)} tokens and the context {config['context_length']}.",
            next_step="Shorten the prompt.",
        )
    try:
        settings = onnxruntime_genai.Config(str(bundle))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        settings.overlay(json.dumps(options))
        model = onnxruntime_genai.Model(settings)
    except RuntimeError as error:
        raise BundleError(
            f"onnxruntime-genai cannot load {bundle}: {str(error).splitlines()[0]}.",
            next_step="Build the bundle again with this version of glmexport.",
        ) from error
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=min(len(prompt) + max_tokens, config["context_length"]), do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    tokens: list[int] = []
    shown = ""
    while not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in ends:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens)
        # A replacement character at the end is the first part of a character still to come.
        complete = text if not text.endswith("\ufffd") else shown
        yield Piece(token, complete[len(shown) :])
        shown = complete
