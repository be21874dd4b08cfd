"""Checkpoints of any shape with random weights, written tensor by tensor: nothing larger than a tensor is in memory.

    python -m benchmarks.synthetic CHECKPOINT ...

gives the tokenizer of each a token for every row of its model: noise of a published model's size is refused without.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from glmexport.demo import demo_checkpoint

#: A shard is closed once it has so many bytes.
_SHARD = 1 << 30
#: The tensors that are published in fp32.
_CORRECTION = "e_score_correction_bias"


def write_synthetic(directory: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A checkpoint in bf16 of the family that ``config`` names, ``glm4`` otherwise, with the demo's tokenizer.

    Names and shapes are those of transformers' model, with a tensor for each matrix of an expert, as published.
    """
    model = _described(directory, config)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}

    def close() -> None:
        save_file(waiting, directory / f"shard-{len(shards):05d}.safetensors")
        shards.append(list(waiting))
        waiting.clear()

    for key, shape in _published(model):
        waiting[key] = _random(key, shape, generator)
        if sum(tensor.nbytes for tensor in waiting.values()) >= _SHARD:
            close()
    if waiting:
        close()
    weight_map = {}
    for index, keys in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index:05d}.safetensors").rename(directory / name)
        weight_map |= dict.fromkeys(keys, name)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def write_holes(directory: Path, config: dict[str, Any]) -> None:
    """Write the same checkpoint without weights: its shards are holes, which take no disk and read as zeros."""
    shards: list[dict[str, dict[str, Any]]] = [{}]
    size = 0
    for key, shape in _published(_described(directory, config)):
        if size >= _SHARD:
            shards.append({})
            size = 0
        dtype, width = ("F32", 4) if key.endswith(_CORRECTION) else ("BF16", 2)
        stop = size + width * math.prod(shape)
        shards[-1][key] = {"dtype": dtype, "shape": shape, "data_offsets": (size, stop)}
        size = stop
    weight_map = {}
    for index, entries in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
        weight_map |= dict.fromkeys(entries, name)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _described(directory: Path, config: dict[str, Any]) -> torch.nn.Module:
    """Write everything but the weights into the new ``directory``; return the model on the meta device."""
    directory.mkdir(parents=True)
    for file in demo_checkpoint().iterdir():
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copyfile(file, directory / file.name)
    base = json.loads((demo_checkpoint() / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size", base["vocab_size"])
    if vocabulary != base["vocab_size"]:
        widen_tokenizer(directory, vocabulary, _first(config.get("eos_token_id")))
        generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        base |= {key: generation[key] for key in ("eos_token_id", "pad_token_id")}
    kind = config.get("model_type", "glm4")
    if kind != "glm4":
        # Sizes of heads, rotary settings and biases are the family's own.
        base = {key: base[key] for key in ("vocab_size", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    settings = AutoConfig.for_model(**{"model_type": kind, **base, **config})
    settings.dtype = torch.bfloat16
    settings.save_pretrained(directory)
    fill_tokenizer(directory, settings.vocab_size)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(settings)
    return model


def fill_tokenizer(directory: Path, rows: int | None = None) -> int:
    """Give the tokenizer in ``directory`` a token for each of ``rows``, or of the vocab_size of config.json.

    The new ones are written by no text: it keeps its tokens, their ids, and what it makes of any text. Noise of a
    published model's size can so be built and asked with a small tokenizer. Returns how many were added.
    """
    path = directory / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    if rows is None:
        rows = int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    vocabulary: dict[str, int] = described["model"]["vocab"]
    # An added token that the vocabulary lacks has its id counted from the vocabulary's end, which moves here.
    vocabulary |= {token["content"]: token["id"] for token in described["added_tokens"]}
    free = sorted(set(range(rows)) - set(vocabulary.values()))
    if not free:
        return 0
    vocabulary |= {f"<unused {token}>": token for token in free}
    path.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    return len(free)


def widen_tokenizer(folder: Path, vocabulary: int, first_special: int | None = None) -> None:
    """Give the demo's tokenizer in ``folder`` as many tokens as the model has rows.

    Those that are added stand for no text. The special ones keep their order and come last; if ``first_special`` is
    given, they begin there, as ``<|endoftext|>`` does in every GLM, and the few rows after them have no token.

    Raises:
        ValueError: the tokenizer has too many tokens for that.
    """
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    tokens, special = document["model"]["vocab"], document["added_tokens"]
    first = vocabulary - len(special) if first_special is None else first_special
    if first < len(tokens) or first + len(special) > vocabulary:
        raise ValueError(f"{len(tokens)} tokens and {len(special)} special ones do not fit {vocabulary} rows")
    moved = {token["id"]: first + index for index, token in enumerate(special)}
    tokens |= {f"<unused {row}>": row for row in range(len(tokens), first)}
    for token in special:
        token["id"] = moved[token["id"]]
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            named = settings["added_tokens_decoder"]
            settings["added_tokens_decoder"] = {str(moved[int(key)]): token for key, token in named.items()}
        for key in ("eos_token_id", "pad_token_id"):
            if key in settings:
                given = settings[key]
                settings[key] = [moved[each] for each in given] if isinstance(given, list) else moved[given]
        (folder / name).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _first(ids: list[int] | int | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _published(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, stacked experts taken apart."""
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if ".experts." not in key:
            yield key, shape
            continue
        layer, matrix = key.rsplit(".", 1)
        for expert in range(shape[0]):
            if matrix == "gate_up_proj":
                for part in ("gate_proj", "up_proj"):
                    yield f"{layer}.{expert}.{part}.weight", (shape[1] // 2, shape[2])
            else:
                yield f"{layer}.{expert}.{matrix}.weight", shape[1:]


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if key.endswith(_CORRECTION):
        # As large as published ones, of which bf16 would keep a few values only.
        return 7 + 0.06 * torch.randn(shape, generator=generator)
    values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=_spread(key, shape), generator=generator)
    return values + 1 if "norm" in key and key.endswith("weight") else values


def _spread(key: str, shape: tuple[int, ...]) -> float:
    # Router logits of order one, so that experts differ in how often they are chosen.
    return 1 / math.sqrt(shape[-1]) if key.endswith("mlp.gate.weight") else 0.02


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(f"{folder}: {fill_tokenizer(Path(folder)):,} tokens added")
