"""A reader of PEFT's adapter_config.json, which says what the tensors of a LoRA adapter mean.

Only what is needed to merge is read. A setting that is neither read here nor known to leave the arithmetic alone must
be off, so that an adapter of a kind that this program does not know is refused and not merged wrongly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport.checkpoint.config import ConfigReader
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import optional

ADAPTER_CONFIG = "adapter_config.json"

MERGE_WITH_PEFT = "merge the adapter with PEFT (merge_and_unload), save the model, and give that as the checkpoint"
"""The next step wherever an adapter is of a kind that is not merged here."""

_READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
#: Settings that steer training, initialisation or loading. What they led to is in the tensors.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
#: Initialisations that change no base weight. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) do, and the adapter does
#: not hold those weights.
_BASE_KEPT = frozenset({"none", "true", "false", "gaussian", "eva", "orthogonal", "mica"})
_OFF: tuple[object, ...] = (None, False, "", [], {})
_ALL_LINEAR = "all-linear"
_SHOWN = 80


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one LoRA adapter. Modules are named as in the base model: ``model.layers.0.mlp.down_proj``."""

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    #: Whether the adapter is an rsLoRA, whose scale is alpha / sqrt(rank).
    rank_stabilized: bool
    #: Whether the adapter is a DoRA: every matrix has a magnitude for each of its outputs.
    dora: bool
    fan_in_fan_out: bool
    #: Biases that were trained: none, all, or lora_only, those of the modules with a low-rank update.
    bias: str
    #: A regular expression or names; None where the file has none.
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    #: Indices of the only layers that ``target_modules``, if they are names, stand for; empty for all.
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    #: Modules that were trained whole.
    modules_to_save: tuple[str, ...]
    #: The name that the base model had.
    base: str | None

    @classmethod
    def read(cls, config: ConfigReader) -> AdapterConfig:
        """Read the settings, and refuse those that would change the arithmetic in a way that is not implemented.

        Raises:
            CheckpointError: not a LoRA adapter, a setting of another type, or one that is not supported; names the
                file and the setting.
        """
        if config.text("peft_type") != "LORA":
            raise _unsupported(config, "peft_type")
        for key, value in config.values.items():
            if key not in _READ | _NEUTRAL and value not in _OFF:
                raise _unsupported(config, key)
        start = str(config.values.get("init_lora_weights")).lower()
        if start not in _BASE_KEPT:
            raise CheckpointError(
                f"{config.where}: init_lora_weights is {start[:_SHOWN]!r}, which changed the base weights as well, and "
                "the adapter does not hold these.",
                next_step="Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of "
                f"it; or {MERGE_WITH_PEFT}.",
            )
        ranks, alphas = (
            config.section(key) if config.has(key) else ConfigReader({}, config.where)
            for key in ("rank_pattern", "alpha_pattern")
        )
        found = cls(
            where=config.where,
            rank=config.integer("r", minimum=1),
            alpha=config.number("lora_alpha"),
            rank_pattern={key: ranks.integer(key, minimum=1) for key in ranks.values},
            alpha_pattern={key: alphas.number(key) for key in alphas.values},
            rank_stabilized=config.flag("use_rslora", default=False),
            dora=config.flag("use_dora", default=False),
            fan_in_fan_out=config.flag("fan_in_fan_out", default=False),
            bias=config.choice("bias", ("none", "all", "lora_only"), default="none"),
            target_modules=_names(config, "target_modules") if config.has("target_modules") else None,
            exclude_modules=_names(config, "exclude_modules") if config.has("exclude_modules") else (),
            layers=config.integers("layers_to_transform", minimum=0) if config.has("layers_to_transform") else (),
            layers_pattern=_listed(config, "layers_pattern"),
            modules_to_save=_listed(config, "modules_to_save"),
            base=config.text("base_model_name_or_path") if config.has("base_model_name_or_path") else None,
        )
        found._check_patterns()
        return found

    def rank_of(self, module: str) -> int:
        """Return the rank of the update of ``module``."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, module) or "", self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor that B A of ``module`` is multiplied by.

        It is alpha / rank (LoRA, arXiv 2106.09685, section 4.1), or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        """
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module) or "", self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def targets(self, module: str) -> bool:
        """Return whether PEFT gives the matrix of ``module`` a low-rank update, by its own rules in its own order."""
        if _named(self.exclude_modules, module) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save
        ):
            return False
        if self.target_modules in (None, _ALL_LINEAR):
            return True
        assert self.target_modules is not None
        if not _named(self.target_modules, module):
            return False
        if not self.layers or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{pattern}\.(?P<index>\d+)\.", module) for pattern in patterns)
        return next((int(match["index"]) in self.layers for match in matches if match), False)

    def _check_patterns(self) -> None:
        single = [name for name in (self.target_modules, self.exclude_modules) if isinstance(name, str)]
        patterns = [*self.rank_pattern, *self.alpha_pattern, *single, *self.modules_to_save, *self.layers_pattern]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{self.where}: {pattern!r} is not a regular expression: {error}.",
                    next_step="Correct the file, or save the adapter again.",
                ) from error


def _unsupported(config: ConfigReader, key: str) -> CheckpointError:
    found = json.dumps(config.values[key], ensure_ascii=False)[:_SHOWN]
    return CheckpointError(
        f"{config.where}: {key} is {found}, and only LoRA, rsLoRA and DoRA are merged here.",
        next_step=f"{MERGE_WITH_PEFT[0].upper()}{MERGE_WITH_PEFT[1:]}.",
    )


def _first_match(patterns: Iterable[str], module: str) -> str | None:
    """Return the first match, as PEFT's get_pattern_key does; a pattern matches the whole name or its last parts."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regular expression matches ``module``, or one of some names is its whole name or its last parts."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(config: ConfigReader, key: str) -> str | tuple[str, ...]:
    return config.text(key) if isinstance(config.values[key], str) else config.texts(key)


def refuse_adapter(directory: Path) -> None:
    """Refuse an adapter that is given in the place of a checkpoint: one without weights of its own.

    Raises:
        CheckpointError: it is one.
    """
    path = optional(directory, ADAPTER_CONFIG, "the checkpoint")
    weights = [name.name for name in directory.glob("*.safetensors") if not name.name.startswith("adapter_")]
    if path is None or weights:
        return
    base = ConfigReader.open(path).values.get("base_model_name_or_path")
    named = f" ({base[:_SHOWN]})" if isinstance(base, str) and base.isprintable() and base else ""
    raise CheckpointError(
        f"{directory} is an adapter, not a checkpoint.",
        next_step=f"Give the checkpoint that it was trained on{named}, and --adapter {directory}.",
    )


def _listed(config: ConfigReader, key: str) -> tuple[str, ...]:
    names = _names(config, key) if config.has(key) else ()
    return (names,) if isinstance(names, str) else names
