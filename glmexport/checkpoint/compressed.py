"""The quantization that a compressed-tensors checkpoint declares, as llm-compressor writes it.

``config_groups`` gives a scheme to modules: their names, regular expressions behind ``re:``, or the class ``Linear``
are its ``targets``; ``ignore`` names those without any. Only what a scheme says of weights counts here. Activations
and caches that a server would quantize are no part of the weights, which a remark says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from glmexport.checkpoint.codes import GROUP_SIZES, CodeFormat, holds_groups
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.patterns import ModulePatterns
from glmexport.foundation.errors import CheckpointError

_FULL = "give the full-precision checkpoint of this model, or one with integer or fp8 weights"
_MIXED = "mixed-precision"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_BITS = (2, 4, 8)
_EXPRESSION = "re:"
_CLASS = "Linear"
_ACTIVATIONS = ("input_activations", "output_activations")
_CACHE = "kv_cache_scheme"
#: Keys that are read, or that say nothing about the weights.
_KNOWN = frozenset({
    "config_groups", "format", "global_compression_ratio", "ignore", "quant_method", "quantization_status", "version",
    "run_compressed", _CACHE,
})  # fmt: skip
_KNOWN_OF_GROUP = frozenset({"targets", "weights", "format", *_ACTIVATIONS})
_KNOWN_OF_WEIGHTS = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
})  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """The weights of one entry of ``config_groups``."""

    targets: tuple[str, ...]
    #: The format of integer weights; None for fp8.
    form: CodeFormat | None
    #: The rows and columns that share a factor, of fp8 blocks.
    block: tuple[int, int] | None


@dataclass(frozen=True)
class CompressedSettings:
    """The schemes of a checkpoint, and the modules that have none."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    patterns: ModulePatterns
    #: Keys that say what a server would quantize beside the weights.
    aside: tuple[str, ...]
    #: Name of the table, for messages.
    where: str

    @property
    def block(self) -> tuple[int, int] | None:
        """The blocks of fp8 weights that have any."""
        return next((scheme.block for scheme in self.schemes if scheme.block), None)

    def form_of(self, module: str) -> CodeFormat:
        """Return the format of the integer weights of ``module``.

        A name decides over an expression, and that over the class.

        Raises:
            CheckpointError: it has none, or an expression takes too long.
        """
        if not any(self._matches(entry, module) for entry in self.ignore):
            for kind in (self._named, self._matched, self._of_class):
                for scheme in self.schemes:
                    if scheme.form is not None and any(kind(target, module) for target in scheme.targets):
                        return scheme.form
        raise CheckpointError(
            f"{self.where}: config_groups and ignore leave {module} in full precision, and the checkpoint has integers "
            "for it.",
            next_step="Use the config.json that belongs to these weights.",
        )

    def _matches(self, entry: str, module: str) -> bool:
        return self._named(entry, module) or self._matched(entry, module) or self._of_class(entry, module)

    def _named(self, entry: str, module: str) -> bool:
        return entry == module

    def _matched(self, entry: str, module: str) -> bool:
        return entry.startswith(_EXPRESSION) and self.patterns.match(entry.removeprefix(_EXPRESSION), module)

    def _of_class(self, entry: str, module: str) -> bool:
        return entry == _CLASS


def read_compressed(given: ConfigReader) -> CompressedSettings:
    """Return what ``given``, the table of config.json, declares.

    Raises:
        CheckpointError: a key that would change what the weights are in a way that is not read here, or one of the
            wrong type; names it.
    """
    table = ConfigReader(given.values, given.where, _FULL)
    for key, value in table.values.items():
        if key == "sparsity_config" and isinstance(value, dict) and value.get("format", "dense") == "dense":
            continue
        if key not in _KNOWN and value not in (None, False, "", [], {}):
            raise _unsupported(table, key)
    if table.has("quantization_status"):
        table.choice("quantization_status", ("compressed",))
    overall = table.choice("format", (*_FORMATS, _MIXED)) if table.has("format") else _MIXED
    groups = table.section("config_groups")
    patterns = ModulePatterns(table.where)
    ignore = table.texts("ignore") if table.has("ignore") else ()
    schemes, aside = [], []
    for name in groups.values:
        group = groups.section(name)
        aside += [key for key in _ACTIVATIONS if group.has(key)]
        _refuse_unknown(group, _KNOWN_OF_GROUP)
        if group.has("format") or overall == _MIXED:
            group.choice("format", _FORMATS)
        targets = group.texts("targets")
        if group.has("weights"):
            schemes.append(_scheme(group.section("weights"), targets))
    if table.has(_CACHE):
        aside.append(_CACHE)
    for entry in (*ignore, *(target for scheme in schemes for target in scheme.targets)):
        if entry.startswith(_EXPRESSION):
            patterns.add(entry.removeprefix(_EXPRESSION))
    return CompressedSettings(tuple(schemes), ignore, patterns, tuple(dict.fromkeys(aside)), table.where)


def _scheme(weights: ConfigReader, targets: tuple[str, ...]) -> Scheme:
    _refuse_unknown(weights, _KNOWN_OF_WEIGHTS)
    kind = weights.choice("type", ("int", "float"), default="int")
    bits = weights.integer("num_bits", default=8)
    if weights.has("dynamic") and weights.flag("dynamic"):
        raise _unsupported(weights, "dynamic")
    strategy, group_size = _strategy(weights)
    if kind == "float":
        if bits != 8:
            raise _refused(weights, "num_bits", f"{bits} of type float", "8")
        if strategy == "group":
            raise _refused(weights, "strategy", "group of type float", "tensor, channel and block")
        return Scheme(targets, None, _block(weights) if strategy == "block" else None)
    if bits not in _BITS:
        raise _refused(weights, "num_bits", str(bits), " and ".join(map(str, _BITS)))
    if strategy == "block":
        raise _refused(weights, "strategy", "block of type int", "tensor, channel and group")
    if not holds_groups(group_size):
        raise _refused(weights, "group_size", str(group_size), GROUP_SIZES)
    return Scheme(targets, CodeFormat(bits, group_size, weights.flag("symmetric", default=True)), None)


def _strategy(weights: ConfigReader) -> tuple[str, int]:
    """Return the strategy, and the weights of a row that share a scale; -1: all of them."""
    size = weights.optional_integer("group_size", minimum=-1)
    if not weights.has("strategy"):
        return ("tensor" if size is None else "group" if size > 0 else "channel"), size or -1
    strategy = weights.choice("strategy", _STRATEGIES)
    return strategy, weights.integer("group_size", minimum=1) if strategy == "group" else -1


def _block(weights: ConfigReader) -> tuple[int, int]:
    size = weights.integers("block_structure", minimum=1)
    if len(size) != 2:
        raise _refused(weights, "block_structure", str(list(size)), "two integers")
    return size[0], size[1]


def _refuse_unknown(table: ConfigReader, known: frozenset[str]) -> None:
    for key in table.values:
        if key not in known and table.has(key):
            raise _unsupported(table, key)


def _unsupported(table: ConfigReader, key: str) -> CheckpointError:
    return CheckpointError(
        f"{table.where}: {key[:80]} is set, which changes what the weights of a checkpoint quantized by "
        "compressed-tensors mean, and is not read here.",
        next_step=f"{_FULL[0].upper()}{_FULL[1:]}.",
    )


def _refused(table: ConfigReader, key: str, value: str, accepted: str) -> CheckpointError:
    return CheckpointError(
        f"{table.where}: {key} is {value}, and accepted is {accepted}.", next_step=f"{_FULL[0].upper()}{_FULL[1:]}."
    )


def activation_tensors(tensors: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of tensors that only a server which quantizes activations or its cache would read."""
    ends = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")
    cache = (".self_attn.k_scale", ".self_attn.v_scale", ".self_attn.q_scale")
    yield from (name for name in tensors if name.endswith((*ends, *cache)))
