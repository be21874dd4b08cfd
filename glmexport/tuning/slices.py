"""What is timed: the whole model if it is small, otherwise two slices that tell a block's cost from the rest's.

A slice is a model of some of the decoder blocks, with the embedding and the lm_head, and passes through graph, lowering
and bundle writer like a whole one. Time is taken as linear in the number of blocks: the slice with fewer blocks, plus
what one block more costs times the blocks that it lacks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glmexport.architecture.description import Architecture, DecoderLayer
from glmexport.assembly.genai import loop_config
from glmexport.assembly.write import BundleContents, write_bundle
from glmexport.bundle.manifest import MANIFEST, FileEntry, Source, read_manifest
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.evidence import CandidateSettings
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.tuning.candidates import with_settings
from glmexport.tuning.rounding import RoundedWeights

#: Tokens that scales of a quantized cache are calibrated on here: their values change no speed.
_CACHED_TOKENS = range(16)
#: Weights of a model that is timed whole, and at least those of the blocks that one slice has more than the other:
#: in 4 bits several times the caches of a processor.
WHOLE_WEIGHTS, ADDED_WEIGHTS = 1 << 30, 1 << 29


def units(architecture: Architecture) -> list[tuple[DecoderLayer, ...]]:
    """The blocks, those together that share what a token attends to."""
    found: list[tuple[DecoderLayer, ...]] = []
    for layer in architecture.layers:
        if layer.attention.shared_selection and found:
            found[-1] = (*found[-1], layer)
        else:
            found.append((layer,))
    return found


@dataclass(frozen=True)
class Slices:
    """The models that are timed: one, or one with fewer blocks and one with more."""

    architectures: tuple[Architecture, ...]
    #: Of the whole model.
    layers: int

    def whole(self, seconds: Sequence[float]) -> float:
        """Of the whole model, from those of ``architectures``."""
        if len(seconds) == 1:
            return seconds[0]
        fewer, more = seconds
        few, many = (len(architecture.layers) for architecture in self.architectures)
        # Noise must not make a block free.
        return fewer + max(0.0, more - fewer) / (many - few) * (self.layers - few)

    @property
    def description(self) -> str:
        """For people."""
        counts = [len(architecture.layers) for architecture in self.architectures]
        if len(counts) == 1:
            return f"all {self.layers} blocks"
        return f"{counts[0]} and {counts[1]} of {self.layers} blocks, extrapolated to all"


def slices_of(architecture: Architecture, whole: int = WHOLE_WEIGHTS, added: int = ADDED_WEIGHTS) -> Slices:
    """Slices of ``architecture``; all of it below ``whole`` weights.

    One unit of each kind, and in the larger slice so many more of the most frequent kind that they have ``added``
    weights, and at least two.
    """
    # A layer that drafts is timed with nobody to take up its drafts.
    architecture = replace(architecture, token_prediction=None)
    parts = units(architecture)
    total = sum(weights_of(unit) for unit in parts)
    everything = Slices((architecture,), len(architecture.layers))
    if total <= whole:
        return everything
    kinds: dict[object, list[int]] = {}
    for index, unit in enumerate(parts):
        kinds.setdefault(_kind(unit), []).append(index)
    frequent = max(kinds.values(), key=len)
    more = max(2, -(-added // weights_of(parts[frequent[0]])))
    first = sorted(indices[0] for indices in kinds.values())
    if more >= len(frequent):
        return everything
    second = sorted([*first, *frequent[1 : 1 + more]])
    chosen = tuple(_slice(architecture, [parts[index] for index in some]) for some in (first, second))
    return Slices(chosen, len(architecture.layers))


def weights_of(layers: Sequence[DecoderLayer]) -> int:
    """Of all linears of some blocks."""
    return sum(linear.out_features * linear.in_features for layer in layers for linear in layer.linears)


def _kind(unit: tuple[DecoderLayer, ...]) -> object:
    return tuple((type(layer.attention), layer.attention.attended, len(layer.linears)) for layer in unit)


def _slice(architecture: Architecture, parts: Sequence[tuple[DecoderLayer, ...]]) -> Architecture:
    """Blocks are counted anew, since loops count the caches; their keys stay the checkpoint's."""
    layers = [layer for part in parts for layer in part]
    return replace(architecture, layers=tuple(replace(layer, index=at) for at, layer in enumerate(layers)))


class SliceBundles:
    """Bundles of the slices in every setting that is asked for, below ``directory``, as a build would write them.

    Weights are rounded to nearest: how fast they are does not depend on their values. Files that two bundles have in
    common are stored once where the file system can.
    """

    def __init__(
        self,
        directory: Path,
        slices: Slices,
        checkpoint: Checkpoint,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        target: Target,
        recipes: Mapping[str, Recipe],
        source: Source,
    ) -> None:
        self._directory = directory
        self._slices = slices
        self._checkpoint = checkpoint
        self._tables = rotary_tables
        self._target = target
        self._recipes = recipes
        self._source = source
        self._files: dict[tuple[str, int], Path] = {}

    def of(self, settings: CandidateSettings) -> list[Path]:
        """A bundle of each slice."""
        target = with_settings(self._target, settings)
        graph = [settings.recipe.replace("/", "--"), f"level-{settings.accuracy_level}"]
        graph += ["fused" if settings.packed_qkv else "split", settings.kv_cache]
        directories = []
        for index, architecture in enumerate(self._slices.architectures):
            graphs = self._directory / f"{'-'.join(graph)}-{index}"
            if not (graphs / MANIFEST).is_file():
                shutil.rmtree(graphs, ignore_errors=True)
                self._write(graphs, architecture, target, self._recipes[settings.recipe])
            directories.append(self._variant(graphs, architecture, target))
        return directories

    def _write(self, directory: Path, architecture: Architecture, target: Target, recipe: Recipe) -> None:
        contents = BundleContents(
            architecture=architecture,
            weights=RoundedWeights(self._checkpoint, architecture, recipe, searched=False),
            rotary_tables=self._tables,
            recipe=recipe,
            target=target,
            source=self._source,
            cache_text=[list(_CACHED_TOKENS)],
        )
        # Somebody else's progress is under way.
        manifest = write_bundle(directory, contents, Silent())
        for entry in manifest.files:
            path, key = directory / entry.path, (entry.sha256, entry.size)
            same = self._files.setdefault(key, path)
            if same != path and same.is_file():
                path.unlink()
                _link(same, path)

    def _variant(self, graphs: Path, architecture: Architecture, target: Target) -> Path:
        """Return the bundle of the same graphs with the session settings of ``target``, in which alone they differ."""
        name, config = loop_config(architecture, target)
        text = json.dumps(config, indent=2) + "\n"
        for variant in sorted(graphs.parent.glob(f"{graphs.name}.*")):
            if (variant / MANIFEST).is_file() and (variant / name).read_text(encoding="utf-8") == text:
                return variant
        variant = graphs.with_name(f"{graphs.name}.{len(list(graphs.parent.glob(f'{graphs.name}.*')))}")
        partial = graphs.with_name(f"partial-{variant.name}")
        shutil.rmtree(partial, ignore_errors=True)
        for path in sorted(graphs.rglob("*")):
            if path.is_file() and path.name not in (name, MANIFEST):
                copy = partial / path.relative_to(graphs)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _link(path, copy)
        (partial / name).write_text(text, encoding="utf-8")
        described = read_manifest(graphs)
        own = FileEntry(path=name, size=(partial / name).stat().st_size, sha256=sha256(partial / name))
        files = tuple(own if entry.path == name else entry for entry in described.files)
        manifest = described.model_copy(update={"target": target, "files": files})
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.rename(variant)
        return variant


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:
        # A file system without links: it takes the space instead.
        shutil.copyfile(path, copy)
