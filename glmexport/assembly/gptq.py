"""A checkpoint in the GPTQ format: quantized matrices as GPTQModel, optimum and transformers read them.

The layout is described in ``glmexport.checkpoint.packed``, which reads it. Asymmetric matrices are written as version 2
(``gptq_v2``), which holds every zero point; symmetric ones as version 1 (``gptq``), which every reader knows.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from glmexport import __version__
from glmexport.architecture.description import Architecture
from glmexport.assembly.read import BundleWeights
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.quantized_linear import QuantizedLinear
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Format

#: ``gptqmodel`` holds gate and up of every MLP as two matrices, as GPTQModel does; ``transformers`` as one.
Layout = Literal["gptqmodel", "transformers"]

QUANTIZE_CONFIG = "quantize_config.json"
SHARD_BYTES = 1 << 30

_WORD_BITS = 32
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Piece:
    """Tensors that are made together: their names and sizes are known before they are."""

    bytes: int
    make: Callable[[], dict[str, Tensor]]


class GptqCheckpoint:
    """What a bundle's quantized linears and its original's other tensors make, planned before anything is read.

    Attributes:
        settings: Content of ``quantize_config.json`` and of ``quantization_config`` in config.json.
        bytes: Size of all tensors.

    Raises:
        InputError: the bundle has no quantized linear, or a matrix does not fill whole words.
    """

    def __init__(self, bundle: BundleWeights, original: Checkpoint, architecture: Architecture, layout: Layout) -> None:
        self._bundle = bundle
        self._original = original
        self._architecture = architecture
        # What the original holds in halves, transformers does too.
        halves = architecture.stacks().items()
        self._halves = {key: pair for key, pair in halves if layout == "gptqmodel" or key in original.derived}
        self._forms = {
            linear.weight: form
            for layer in architecture.layers
            for linear in layer.linears
            if (form := bundle.form(linear.weight)) is not None
        }
        if not self._forms:
            raise InputError(
                "The bundle's linears are in full precision; there is nothing to write in the GPTQ format.",
                next_step="Convert a bundle of a quantizing recipe.",
            )
        for key, form in self._forms.items():
            if form.codec != "affine":
                raise InputError(
                    f"{key} is stored as {form.label}, which the GPTQ format does not know.",
                    next_step="Convert a bundle of another recipe.",
                )
        if architecture.routed and layout == "transformers":
            raise InputError(
                "transformers has no GPTQ layout for mixtures of experts: its experts are one tensor a layer.",
                next_step="Leave --layout out: gptqmodel's has a matrix an expert.",
            )
        self._offset = 1 if all(form.symmetric for form in self._forms.values()) else 0
        shapes = architecture.shapes()
        self.settings = self._settings(shapes)
        self._pieces = [self._piece(key, shape) for key, shape in shapes.items()]
        self.bytes = sum(piece.bytes for piece in self._pieces)

    def write(self, directory: Path, files: Iterable[Path], progress: Progress, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the checkpoint into ``directory``, which must not exist, one shard in memory at a time.

        Args:
            directory: where.
            files: tokenizer and other files of the original that go with it.
            progress: who watches.
            shard_bytes: size of a shard, exceeded only by a single larger matrix.
        """
        directory.mkdir(parents=True)
        shards = self._shards(shard_bytes)
        weight_map: dict[str, str] = {}
        with progress.track("Writing the checkpoint", len(self._pieces)) as track:
            for number, pieces in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                name = name if len(shards) > 1 else "model.safetensors"
                tensors: dict[str, Tensor] = {}
                for piece in pieces:
                    tensors |= piece.make()
                    track.advance(1, name)
                # transformers refuses shards that do not say which framework wrote them.
                save_file(tensors, directory / name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(directory / "model.safetensors.index.json", index)
        for file in files:
            copy = directory / file.relative_to(self._original.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        _write_json(directory / "config.json", {**self._original.config.values, "quantization_config": self.settings})
        _write_json(directory / QUANTIZE_CONFIG, self.settings)
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb+") as written:
                    os.fsync(written.fileno())

    def _settings(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        weights: Counter[Format] = Counter()
        for key, each in self._forms.items():
            weights[each] += math.prod(shapes[key])
        main = weights.most_common(1)[0][0]
        dynamic: dict[str, dict[str, Any]] = {}
        for layer in self._architecture.layers:
            for linear in layer.linears:
                form = self._forms.get(linear.weight)
                if form == main:
                    continue
                for key in self._halves.get(linear.weight, (linear.weight,)):
                    module = re.escape(key.removesuffix(".weight"))
                    dynamic[f"{'-' if form is None else '+'}:^{module}$"] = {} if form is None else _described(form)
        version = "gptq" if self._offset else "gptq_v2"
        return {
            **_described(main),
            "desc_act": False,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"glmexport:{__version__}"]},
        }

    def _piece(self, key: str, shape: tuple[int, ...]) -> _Piece:
        names = self._halves.get(key, (key,))
        form = self._forms.get(key)
        if form is None:
            return self._plain(key, names, shape)
        rows, columns = shape
        fields = _WORD_BITS // form.bits
        if rows // len(names) % fields or columns % fields:
            raise InputError(
                f"{key} is {rows} x {columns}; the GPTQ format needs multiples of {fields} at {form.bits} bits.",
                next_step="Convert a bundle of another recipe.",
            )
        groups = -(-columns // form.group_size)
        size = rows * columns * form.bits // 8 + groups * rows * (form.bits / 8 + 2) + 4 * columns * len(names)

        def make() -> dict[str, Tensor]:
            linear = self._bundle.quantized(key)
            assert linear is not None
            height = rows // len(names)
            tensors: dict[str, Tensor] = {}
            for index, name in enumerate(names):
                part = linear.take(index * height, (index + 1) * height)
                tensors |= gptq_tensors(name.removesuffix(".weight"), part, self._offset)
            return tensors

        return _Piece(int(size), make)

    def _plain(self, key: str, names: tuple[str, ...], shape: tuple[int, ...]) -> _Piece:
        entry = self._original.tensors[key]
        if entry.dtype not in _DTYPES:
            raise InputError(
                f"{key} is stored as {entry.dtype} in {self._original.name}, and not in full precision.",
                next_step="Convert a bundle that was built from a full-precision checkpoint.",
            )
        height = shape[0] // len(names)

        def make() -> dict[str, Tensor]:
            tensor = self._original.read(key, _DTYPES[entry.dtype])
            return {name: tensor[index * height :][:height].clone() for index, name in enumerate(names)}

        return _Piece(entry.bytes, make)

    def _shards(self, shard_bytes: int) -> list[list[_Piece]]:
        shards: list[list[_Piece]] = [[]]
        filled = 0
        for piece in self._pieces:
            if shards[-1] and filled + piece.bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(piece)
            filled += piece.bytes
        return shards


def gptq_tensors(module: str, linear: QuantizedLinear, offset: int) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of one linear.

    Args:
        module: prefix of their names.
        linear: [N, K], both multiples of 32 / bits.
        offset: what is subtracted from the zero points: 1 for version 1, 0 for version 2.
    """
    rows, columns = linear.codes.shape
    zero_points = linear.zero_points
    if zero_points is None:
        zero_points = torch.full((rows, linear.groups), 2 ** (linear.form.bits - 1), dtype=torch.uint8)
    packed = pack_words(zero_points.T.contiguous(), linear.form.bits)
    if offset:
        packed = _wrapped(packed.long() - offset * _one_in_each_field(linear.form.bits))
    return {
        f"{module}.qweight": pack_words(linear.codes, linear.form.bits).T.contiguous(),
        f"{module}.qzeros": packed,
        f"{module}.scales": linear.scales.T.contiguous(),
        f"{module}.g_idx": (torch.arange(columns) // linear.form.group_size).to(torch.int32),
    }


def pack_words(values: Tensor, bits: int) -> Tensor:
    """[..., n] uint8 as [..., n * bits / 32] int32, the first of the values in a word in its lowest bits."""
    fields = _WORD_BITS // bits
    grouped = values.reshape(*values.shape[:-1], -1, fields)
    words = torch.zeros(grouped.shape[:-1], dtype=torch.int64)
    for field in range(fields):
        words |= grouped[..., field].long() << (bits * field)
    return _wrapped(words)


def _wrapped(words: Tensor) -> Tensor:
    """int64 values modulo 2^32 as int32 of the same bits."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _one_in_each_field(bits: int) -> int:
    return sum(1 << shift for shift in range(0, _WORD_BITS, bits))


def _described(form: Format) -> dict[str, Any]:
    return {"bits": form.bits, "group_size": form.group_size, "sym": form.symmetric}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
