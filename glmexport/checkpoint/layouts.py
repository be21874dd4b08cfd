"""The quantization of a checkpoint, recognised from its configuration and tensors; and advice where it is not read.

Four layouts are read: GPTQ, AWQ, compressed-tensors, and fp8 with a factor a block. All others are named, so that
nobody takes one for another: the same keys mean other arithmetic in each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.gptq import QUANTIZE_CONFIG
from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import optional

GPTQ, FP8, AWQ, COMPRESSED = "GPTQ", "fp8", "AWQ", "compressed-tensors"
_READ = (GPTQ, FP8, AWQ, COMPRESSED)
_MLX, _BITSANDBYTES, _AUTO_ROUND = "MLX", "bitsandbytes", "AutoRound"
_MODELOPT, _MXFP4 = "NVIDIA ModelOpt", "MXFP4"
#: ``quant_method`` without signs, as the libraries write it.
_METHODS = {
    "gptq": GPTQ,
    "gptqmodel": GPTQ,
    "fp8": FP8,
    "awq": AWQ,
    "autoround": _AUTO_ROUND,
    "intelautoround": _AUTO_ROUND,
    "bitsandbytes": _BITSANDBYTES,
    "compressedtensors": COMPRESSED,
    "modelopt": _MODELOPT,
    "modeloptfp4": _MODELOPT,
    "fbgemmfp8": "FBGEMM fp8",
    "hqq": "HQQ",
    "quark": "AMD Quark",
    "mxfp4": _MXFP4,
    "gguf": "GGUF",
    "torchao": "torchao",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "bitnet158": "BitNet",
    "mlx": _MLX,
}
#: Keys of tables that do not name their method: the first that a table has tells.
_KEYS = {
    "load_in_4bit": _BITSANDBYTES,
    "load_in_8bit": _BITSANDBYTES,
    "_load_in_4bit": _BITSANDBYTES,
    "bnb_4bit_quant_type": _BITSANDBYTES,
    "autoround_version": _AUTO_ROUND,
    "config_groups": COMPRESSED,
    "q_group_size": AWQ,
    "w_bit": AWQ,
    "zero_point": AWQ,
    "quant_algo": _MODELOPT,
    "weight_block_size": FP8,
    "nbits": "HQQ",
}
#: Ends of the names of tensors that only one library writes.
_ENDS = {
    ".weight.absmax": _BITSANDBYTES,
    ".weight.quant_map": _BITSANDBYTES,
    ".SCB": _BITSANDBYTES,
    ".weight_packed": COMPRESSED,
    ".weight_scale_2": _MODELOPT,
    "_proj_blocks": _MXFP4,
}
_MLX_SECTION = "quantization"
#: Tables at the top of config.json, of which transformers ignores MLX's; and files beside it, all of which it ignores.
#: Beside full-precision weights only those that somebody reads are in the way.
_SECTIONS = ("quantization_config", _MLX_SECTION, "compression_config")
SETTINGS_FILES = ("quantization_config.json", "quant_config.json", "hf_quant_config.json", QUANTIZE_CONFIG)
"""The names of files beside config.json in which libraries say how weights are quantized."""

_FULL = "Give the full-precision checkpoint of this model, as its publisher has it (bf16 safetensors)"
_NEXT = {
    _AUTO_ROUND: f"{_FULL}; or export the model with AutoRound in its format auto_gptq.",
    _MLX: f"{_FULL}; or write one from this with mlx_lm.convert --dequantize.",
    _BITSANDBYTES: f"{_FULL}; or load this with transformers, call dequantize(), and save it.",
}


@dataclass(frozen=True)
class _Declared:
    """The declaration of one table."""

    layout: str
    table: ConfigReader
    #: The part that a person can take away.
    removable: str
    #: Whether nobody reads it unless the weights need it.
    ignored: bool


def refuse_gguf(directory: Path) -> None:
    """Refuse a folder of GGUF files by that name: it need not even have a config.json.

    Raises:
        CheckpointError: the only weights are such.
    """
    names = sorted(path.name for path in directory.iterdir())
    found = [name for name in names if name.lower().endswith(".gguf")]
    if found and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{directory} is a GGUF model ({found[0]}), which is read by llama.cpp and not here.", next_step=f"{_FULL}."
        )


def declared_layout(
    directory: Path, config: ConfigReader, tensors: Mapping[str, TensorEntry]
) -> tuple[str | None, list[ConfigReader]]:
    """Return the layout of quantized weights and the tables that declare it; None if they are in full precision.

    Raises:
        CheckpointError: they are quantized by a library whose layout is not read here, or an entry is left over;
            names the layout, what says so, and what to give instead.
        MachineError: the machine does not let us read a file.
    """
    whole = all(entry.dtype in WEIGHT_DTYPES for entry in tensors.values())
    read: list[_Declared] = []
    for found in _declared(directory, config):
        if whole and found.ignored:
            continue
        # GPTQ without packed tensors is told where they are looked for.
        if whole and found.layout != GPTQ:
            raise CheckpointError(
                f"{found.table.where} says {found.layout}, and every tensor is in full precision "
                f"({', '.join(sorted({entry.dtype for entry in tensors.values()}))}): the entry is left over.",
                next_step=f"If these are the weights that you mean, remove {found.removable}.",
            )
        if found.layout not in _READ:
            raise _quantized(found.table.where, found.layout)
        read.append(found)
    if len({found.layout for found in read}) > 1:
        raise CheckpointError(
            f"{read[0].table.where} says {read[0].layout}, and {read[-1].table.where} says {read[-1].layout}.",
            next_step="Remove the one that does not belong to these weights.",
        )
    declared = read[0].layout if read else None
    for name, entry in tensors.items():
        layout = _layout_of(name, entry, tensors)
        if layout is not None and layout != declared:
            raise _quantized(f"{entry.path}: {name}", layout)
    return declared, [found.table for found in read]


def _quantized(where: str, layout: str) -> CheckpointError:
    if layout == COMPRESSED:
        return CheckpointError(
            f"{where}: the checkpoint is quantized by {layout}; config.json does not say how.",
            next_step="Use the config.json that belongs to these weights, which has a quantization_config.",
        )
    return CheckpointError(
        f"{where}: the checkpoint is quantized by {layout}; accepted are full precision, GPTQ, AWQ, compressed-tensors "
        "and fp8 in blocks.",
        next_step=_NEXT.get(layout, f"{_FULL}, or one in the GPTQ format."),
    )


def _declared(directory: Path, config: ConfigReader) -> Iterator[_Declared]:
    for key in _SECTIONS:
        if config.has(key):
            table = config.section(key)
            # MLX writes its table twice, and neither says whose it is.
            layout = _MLX if config.has(_MLX_SECTION) and not table.has("quant_method") else _named(table)
            yield _Declared(layout, table, f"{key} from {config.where}", ignored=key == _MLX_SECTION)
    for name in SETTINGS_FILES:
        path = optional(directory, name, "the checkpoint")
        if path is not None:
            table = ConfigReader.open(path)
            yield _Declared(_named(table), table, str(path), ignored=name != QUANTIZE_CONFIG)


def _named(table: ConfigReader) -> str:
    if table.has("quant_method"):
        method = table.text("quant_method")
        return _METHODS.get("".join(filter(str.isalnum, method.lower())), repr(method[:40]))
    if table.has("quantization"):
        # ModelOpt's file has its table one level down.
        return _named(table.section("quantization"))
    for key, layout in _KEYS.items():
        if key in table.values:
            return layout
    # Files of auto-gptq's first versions, which quantize_config.json is the name of, do not say the method.
    return GPTQ


def _layout_of(name: str, entry: TensorEntry, tensors: Collection[str]) -> str | None:
    """Return the layout with such a tensor, if no other layout has one; None if any could have it."""
    for end, layout in _ENDS.items():
        if name.endswith(end):
            return layout
    stem = name.removesuffix(".weight")
    mlx = entry.dtype == "U32" and stem != name and f"{stem}.scales" in tensors
    return _MLX if mlx else None
