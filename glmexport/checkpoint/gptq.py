"""The GPTQ quantization that a checkpoint declares: ``quantization_config`` in config.json, or quantize_config.json.

The format is that of auto-gptq and of its successor GPTQModel, which optimum and transformers read too. Version 1
(``checkpoint_format`` "gptq") stores every zero point minus one, version 2 ("gptq_v2") as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glmexport.checkpoint.codes import GROUP_SIZES, CodeFormat, holds_groups
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.patterns import ModulePatterns
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import optional

QUANTIZE_CONFIG = "quantize_config.json"

_SECTION = "quantization_config"
_BITS = (4, 8)
#: The number that is added to the zero points that each version stores.
VERSIONS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class FormatOverride:
    """An entry of ``dynamic``: module names that ``pattern`` matches have ``form``; None: not quantized."""

    pattern: str
    form: CodeFormat | None


@dataclass(frozen=True)
class GptqSettings:
    """The whole checkpoint's quantization, and the exceptions from it."""

    form: CodeFormat
    #: The number that is added to stored zero points; None where the configuration does not give the version.
    zero_point_offset: int | None
    overrides: tuple[FormatOverride, ...]
    patterns: ModulePatterns
    #: Name of the file, for messages.
    where: str

    def format_of(self, module: str) -> CodeFormat | None:
        """Return the format of ``module``; None if it is left out. The first override that matches decides."""
        for override in self.overrides:
            if self.patterns.match(override.pattern, module):
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
    dynamic = table.section("dynamic") if table.has("dynamic") else ConfigReader({}, table.where)
    patterns = ModulePatterns(dynamic.where)
    for key in dynamic.values:
        pattern = key[2:] if key.startswith(("-:", "+:")) else key
        patterns.add(pattern)
        overrides.append(
            FormatOverride(pattern, None if key.startswith("-:") else _form(dynamic.section(key), form))
        )
    return GptqSettings(form, _zero_point_offset(table), tuple(overrides), patterns, table.where)


def _form(table: ConfigReader, base: CodeFormat | None) -> CodeFormat:
    bits = table.integer("bits", default=base.bits if base else None)
    if bits not in _BITS:
        raise CheckpointError(
            f"{table.where}: bits is {bits}; the bundle's format has {' and '.join(map(str, _BITS))}.",
            next_step="Use a GPTQ checkpoint of one of these, or build from the full-precision checkpoint.",
        )
    group_size = table.integer("group_size", default=base.group_size if base else None)
    if not holds_groups(group_size):
        raise CheckpointError(
            f"{table.where}: group_size is {group_size}; accepted are {GROUP_SIZES}.",
            next_step="Use a GPTQ checkpoint of one of these, or build from the full-precision checkpoint.",
        )
    # Where it is absent, auto-gptq, GPTQModel and transformers all take it for true.
    return CodeFormat(bits, group_size, table.flag("sym", default=base.symmetric if base else True))


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
        "dynamic": [(override.pattern, override.form) for override in settings.overrides],
    }


def _shown(value: object) -> str:
    return "another table" if isinstance(value, list) else json.dumps(value)
