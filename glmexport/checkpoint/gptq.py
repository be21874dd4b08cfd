"""The GPTQ quantization that a checkpoint declares: ``quantization_config`` in config.json, or quantize_config.json.

The format is that of auto-gptq and of its successor GPTQModel, which optimum and transformers read too. Version 1
(``checkpoint_format`` "gptq") stores every zero point minus one, version 2 ("gptq_v2") as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import optional
from glmexport.foundation.recipe import Format

QUANTIZE_CONFIG = "quantize_config.json"

_SECTION = "quantization_config"
_BITS = (4, 8)
#: Scales of wider groups are repeated for several groups of this many weights, which changes no product.
_SPLIT = 128
_GROUP_SIZES = (16, 32, 64, 128, 256)
#: The number that is added to the zero points that each version stores.
VERSIONS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class GptqFormat:
    """The format that one matrix is stored in."""

    bits: int
    #: Weights that share a scale; -1: all of a row.
    group_size: int
    symmetric: bool

    @property
    def exact(self) -> Format:
        """The format in which a bundle stores the same codes; where its groups are smaller, scales are repeated."""
        size = self.group_size if self.group_size in _GROUP_SIZES else _SPLIT
        return Format.model_validate({"bits": self.bits, "group_size": size, "symmetric": self.symmetric})

    @property
    def label(self) -> str:
        """The short name, for example ``w4g128-sym``; ``w4row`` where a row has one scale."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}{group}{'-sym' if self.symmetric else ''}"


@dataclass(frozen=True)
class FormatOverride:
    """An entry of ``dynamic``: module names that ``pattern`` matches have ``form``; None: not quantized."""

    pattern: re.Pattern[str]
    form: GptqFormat | None


@dataclass(frozen=True)
class GptqSettings:
    """The whole checkpoint's quantization, and the exceptions from it."""

    form: GptqFormat
    #: The number that is added to stored zero points; None where the configuration does not give the version.
    zero_point_offset: int | None
    overrides: tuple[FormatOverride, ...]
    #: Name of the file, for messages.
    where: str

    def format_of(self, module: str) -> GptqFormat | None:
        """Return the format of ``module``; None if it is left out. The first override that matches decides."""
        for override in self.overrides:
            if override.pattern.match(module):
                return override.form
        return self.form

    def with_offset(self, offset: int | None) -> GptqSettings:
        """Return the settings of the version that adds ``offset`` to stored zero points."""
        return replace(self, zero_point_offset=offset)


def read_settings(directory: Path, config: ConfigReader) -> GptqSettings | None:
    """Return the quantization that the checkpoint in ``directory`` declares; None for a full-precision one.

    Raises:
        CheckpointError: a format that has no exact counterpart here, or two files that
            contradict each other; names the file and the key.
        MachineError: the machine does not let us read a file.
    """
    tables = []
    if config.has(_SECTION):
        tables.append(config.section(_SECTION))
    path = optional(directory, QUANTIZE_CONFIG, "the checkpoint")
    if path is not None:
        tables.append(ConfigReader.open(path))
    settings = [_settings(table) for table in tables]
    if not settings:
        return None
    first = settings[0]
    for second in settings[1:]:
        _refuse_conflict(first, second)
        if first.zero_point_offset is None:
            first = first.with_offset(second.zero_point_offset)
    return first


def _settings(table: ConfigReader) -> GptqSettings:
    form = _form(table, None)
    table.choice("pack_dtype", ("int32",), default="int32")
    overrides = []
    # "dynamic" is GPTQModel's: a regular expression, matched from the start of the module's name, to a table.
    dynamic = table.section("dynamic") if table.has("dynamic") else None
    for pattern in dynamic.values if dynamic is not None else ():
        assert dynamic is not None
        overrides.append(_override(dynamic, pattern, form))
    return GptqSettings(form, _zero_point_offset(table), tuple(overrides), table.where)


def _override(dynamic: ConfigReader, pattern: str, form: GptqFormat) -> FormatOverride:
    excluded = pattern.startswith("-:")
    try:
        compiled = re.compile(pattern[2:] if pattern.startswith(("-:", "+:")) else pattern)
    except re.error as error:
        raise CheckpointError(
            f"{dynamic.where}: {pattern!r} is no regular expression: {error}.", next_step="Correct the file."
        ) from error
    return FormatOverride(compiled, None if excluded else _form(dynamic.section(pattern), form))


def _form(table: ConfigReader, base: GptqFormat | None) -> GptqFormat:
    bits = table.integer("bits", default=base.bits if base else None)
    if bits not in _BITS:
        raise CheckpointError(
            f"{table.where}: bits is {bits}; the bundle's format has {' and '.join(map(str, _BITS))}.",
            next_step="Use a GPTQ checkpoint of one of these, or build from the full-precision checkpoint.",
        )
    group_size = table.integer("group_size", default=base.group_size if base else None)
    if group_size not in _GROUP_SIZES and group_size != -1 and (group_size <= 0 or group_size % _SPLIT):
        raise CheckpointError(
            f"{table.where}: group_size is {group_size}; accepted are {', '.join(map(str, _GROUP_SIZES))}, "
            f"multiples of {_SPLIT}, and -1.",
            next_step="Use a GPTQ checkpoint of one of these, or build from the full-precision checkpoint.",
        )
    # Where it is absent, auto-gptq, GPTQModel and transformers all take it for true.
    return GptqFormat(bits, group_size, table.flag("sym", default=base.symmetric if base else True))


def _zero_point_offset(table: ConfigReader) -> int | None:
    versions = [table.choice(key, VERSIONS) for key in ("checkpoint_format", "format") if table.has(key)]
    if len(set(versions)) > 1:
        raise CheckpointError(
            f"{table.where}: checkpoint_format is {versions[0]} and format is {versions[1]}.",
            next_step="Correct the one that is wrong: gptq stores zero points minus one, gptq_v2 as they are.",
        )
    return VERSIONS[versions[0]] if versions else None


def _refuse_conflict(first: GptqSettings, second: GptqSettings) -> None:
    a, b = _comparable(first), _comparable(second)
    for key in a:
        # A file that does not say the version contradicts nobody.
        if a[key] != b[key] and not (key == "checkpoint_format" and None in (a[key], b[key])):
            raise CheckpointError(
                f"{first.where} says {key} {_shown(a[key])}, and {second.where} says {_shown(b[key])}.",
                next_step="Correct or remove the one that does not belong to these weights.",
            )


def _comparable(settings: GptqSettings) -> Mapping[str, object]:
    names = {offset: name for name, offset in VERSIONS.items()}
    offset = settings.zero_point_offset
    return {
        "bits": settings.form.bits,
        "group_size": settings.form.group_size,
        "sym": settings.form.symmetric,
        "checkpoint_format": None if offset is None else names[offset],
        "dynamic": [(override.pattern.pattern, override.form) for override in settings.overrides],
    }


def _shown(value: object) -> str:
    return "another table" if isinstance(value, list) else json.dumps(value)
