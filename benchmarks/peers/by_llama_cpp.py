"""llama.cpp's Q4_0, Q4_1 and Q4_K_M. The quantizer is the ggml inside xllamacpp's wheel, called matrix by matrix.

Which type a matrix gets, and which one instead where the columns are not a multiple of its blocks of 256, are the
rules of llama-quantize. With an importance matrix, columns count by the mean square of their inputs in the original.
"""

from __future__ import annotations

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import load_model, request
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

#: default is the type of the format asked for: Q4_0 symmetric, Q4_1 asymmetric, both in groups of 32.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"mixture": None, "importance": False},
    "imatrix": {"mixture": None, "importance": True},
    "Q4_K_M": {"mixture": "Q4_K_M", "importance": False},
    "Q4_K_M-imatrix": {"mixture": "Q4_K_M", "importance": True},
}
#: Instead of types whose blocks do not divide the columns.
FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}


def wanted(name: str, layers: int, mixture: str | None, symmetric: bool, importance: bool) -> Kind:
    """The type that llama-quantize has in mind for the linear ``name``."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"{name} is in no layer")
    layer = int(found[1])
    if mixture is None:
        if symmetric and importance and name.endswith("down_proj") and layer < layers // 8:
            return Kind.Q4_1
        return Kind.Q4_0 if symmetric else Kind.Q4_1
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return Kind.Q6_K if more and name.endswith(("v_proj", "down_proj")) else Kind.Q4_K


def importances(model: torch.nn.Module, ids: Tensor) -> dict[torch.nn.Module, np.ndarray]:
    """Mean square of the inputs of every linear of the blocks, a column, over all tokens."""
    sums: dict[torch.nn.Module, Tensor] = {}

    def add(module: torch.nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        sums[module] = sums.get(module, 0) + given[0].detach().double().square().flatten(0, -2).sum(0)

    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in linears]
    for rows in ids.split(8):
        with torch.inference_mode():
            model.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {module: (value / ids.numel()).float().numpy() for module, value in sums.items()}


def library() -> ctypes.CDLL:
    """The ggml inside the wheel."""
    folder = Path(find_spec("xllamacpp").submodule_search_locations[0])
    (path,) = folder.glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_version.restype = ctypes.c_char_p
    return ggml


def quantize(ggml: ctypes.CDLL, weight: np.ndarray, kind: Kind, importance: np.ndarray | None) -> tuple[Tensor, int]:
    """(weight as its file would hold it, bits that it occupies there).

    Raises:
        ValueError: the quantizer wrote another number of bytes than the type takes.
    """
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.empty((rows, columns // block * size), np.uint8)
    given = None if importance is None else importance.ctypes.data
    written = ggml.ggml_quantize_chunk(int(kind), weight.ctypes.data, packed.ctypes.data, 0, rows, columns, given)
    if written != packed.nbytes:
        raise ValueError(f"{kind.name} of {rows} x {columns} took {written} bytes, not {packed.nbytes}")
    return torch.from_numpy(gguf.quants.dequantize(packed, kind)), 8 * packed.nbytes


def main() -> None:
    asked = request(list(SETTINGS))
    settings = SETTINGS[asked.setting]
    if asked.group_size != 32 or (asked.symmetric and settings["mixture"]):
        raise ValueError(f"{asked.setting} has no groups of {asked.group_size} {'symmetric' * asked.symmetric}")
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
        ggml = library()
    with asked.clock("quantizing"):
        importance = importances(model, asked.ids()) if settings["importance"] else {}
    weights: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    fallbacks, occupied = [], 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not name.startswith("model.layers."):
            continue
        kind = wanted(name, len(model.model.layers), settings["mixture"], asked.symmetric, bool(settings["importance"]))
        if module.in_features % gguf.GGML_QUANT_SIZES[kind][0]:
            fallbacks.append(f"{name}: {FALLBACK[kind].name} instead of {kind.name}, {module.in_features} columns")
            kind = FALLBACK[kind]
        kinds[name] = kind.name
        weight = np.ascontiguousarray(module.weight.detach().numpy())
        with asked.clock("quantizing"):
            weights[f"{name}.weight"], bits = quantize(ggml, weight, kind, importance.get(module))
        occupied += bits
    asked.write(
        weights,
        occupied,
        {**settings, "ggml": ggml.ggml_version().decode()},
        ["xllamacpp", "gguf"],
        formats=kinds,
        fallbacks=fallbacks,
    )


if __name__ == "__main__":
    main()
