"""Checkpoints, whole and broken, written byte by byte where the library would refuse to write them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def entry(dtype: str = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [begin, end],
    }


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header (a table, or bytes as they are) and any announced length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_checkpoint(
    directory: Path,
    shards: dict[str, dict[str, torch.Tensor]] | None = None,
    index: dict[str, str] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """A directory with a config, shards (one with the tensors a and b where none are given), and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config or {"model_type": "glm4"})
    if shards is None:
        shards = {"model.safetensors": {"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(4)}}
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    if index is not None:
        write_json(directory / INDEX, {"metadata": {}, "weight_map": index})
    return directory


def write_tokenizer(directory: Path, *, glm: bool = True, **config: object) -> Path:
    """A byte-level BPE with a few merges; with GLM's special tokens, or with <s> and </s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(["the theory of the other", "der Himmel ist hell"] * 4, trainer)
    special = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"] if glm else ["<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>"} if glm else {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(
        directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    )
    return directory
