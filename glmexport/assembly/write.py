"""A bundle is written to disk: graphs, weights, tokenizer, configuration and manifest, in a directory of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save_file

from glmexport import __version__
from glmexport.architecture.description import Architecture
from glmexport.assembly.cache_scales import calibrate_caches, set_scales
from glmexport.assembly.external import write_graphs
from glmexport.assembly.genai import loop_config
from glmexport.bundle.manifest import (
    MANIFEST,
    CacheQuantization,
    CalibrationSource,
    DraftGraph,
    LargestActivation,
    Manifest,
    Precision,
    Source,
    list_files,
)
from glmexport.bundle.names import DRAFT, FOLDS, MODEL, SCORING, STEP
from glmexport.bundle.records import AllocatedGroup, QuantizedMatrix
from glmexport.checkpoint.fold import as_tensors
from glmexport.formats.codecs import stored_bits
from glmexport.foundation.files import write_atomically
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import GraphLimits, Target
from glmexport.graph.build import build_draft, build_graph
from glmexport.graph.fixed import build_fixed, fixed_sizes
from glmexport.lowering.pipeline import lower
from glmexport.lowering.stored import stored_tensors
from glmexport.quantization.record import coverage
from glmexport.quantization.weights import Weights

#: The graph that scales of caches are calibrated with; it is removed before the manifest is written.
_CALIBRATION = "calibration.onnx"


@dataclass(frozen=True)
class BundleContents:
    """The contents that a bundle is written from; the same contents give the same bytes."""

    architecture: Architecture
    weights: Weights
    #: The cosines and sines [context, dimensions / 2] fp32.
    rotary_tables: tuple[torch.Tensor, torch.Tensor]
    recipe: Recipe
    target: Target
    source: Source
    #: The calibration text; None where the recipe needs no text.
    calibration: CalibrationSource | None = None
    records: Sequence[QuantizedMatrix] = ()
    allocation: Sequence[AllocatedGroup] = ()
    draft_records: Sequence[QuantizedMatrix] = ()
    #: The largest number of the calibration text; None: no text was run.
    largest: LargestActivation | None = None
    #: The files of the tokenizer, tokenizer.json first; further chat templates are in a folder beside it.
    tokenizer_files: Sequence[Path] = ()
    #: Token ids that the scales of a quantized cache are calibrated on.
    cache_text: Sequence[Sequence[int]] = ()
    #: The name of the route by which quantization computed products of fp32 matrices; None: nothing was computed.
    arithmetic: str | None = None


def write_bundle(directory: Path, contents: BundleContents, progress: Progress) -> Manifest:
    """Write the bundle into ``directory``, which must not exist, and return its manifest.

    The manifest is written last, so a directory without one is not a bundle.
    """
    directory.mkdir(parents=True)
    graphs = _lowered(contents)
    cache = _write_graphs(graphs, directory, contents, progress)
    if contents.weights.checkpoint.folds:
        save_file(as_tensors(contents.weights.checkpoint.folds), directory / FOLDS)
    name, config = loop_config(contents.architecture, contents.target)
    (directory / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer(directory, contents.tokenizer_files)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _flush(path)
    manifest = _manifest(directory, contents, graphs, cache)
    write_atomically(directory / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def _lowered(contents: BundleContents) -> dict[str, ir.Model]:
    """Return the graphs for the target, by their files."""
    built = graphs_of(contents.architecture, contents.target.graph)
    return {
        name: lower(graph, contents.target, contents.weights, contents.rotary_tables) for name, graph in built.items()
    }


def _write_graphs(
    graphs: Mapping[str, ir.Model], directory: Path, contents: BundleContents, progress: Progress
) -> CacheQuantization | None:
    """Write the graphs and their weights; return how the caches are quantized, if they are."""
    architecture, target, weights = contents.architecture, contents.target, contents.weights
    limits, largest_file = target.graph, target.memory.max_file_bytes
    if limits.kv_cache == "activations":
        write_graphs(graphs, directory, progress, largest_file)
        return None
    # The same graph with a cache of floats, over the same weights, shows the values that have to be quantized.
    floats = target.model_copy(update={"graph": limits.model_copy(update={"kv_cache": "activations"})})
    plain = build_graph(architecture, floats.graph, every_position=False)
    calibrating = lower(plain, floats, weights, contents.rotary_tables)
    write_graphs({**graphs, _CALIBRATION: calibrating}, directory, progress, largest_file)
    scales = calibrate_caches(directory / _CALIBRATION, architecture, limits, contents.cache_text, progress)
    (directory / _CALIBRATION).unlink()
    for name, model in graphs.items():
        set_scales(model, scales)
        ir.save(model, directory / name)
    return CacheQuantization(
        format=limits.kv_cache,
        scales=limits.kv_scales,
        sequences=len(contents.cache_text),
        tokens=sum(map(len, contents.cache_text)),
    )


def _copy_tokenizer(directory: Path, files: Sequence[Path]) -> None:
    """Copy the files and do not link them: runtimes refuse links that leave the directory."""
    for file in files:
        copy = directory / file.relative_to(files[0].parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _manifest(
    directory: Path, contents: BundleContents, graphs: Mapping[str, ir.Model], cache: CacheQuantization | None
) -> Manifest:
    """Return the manifest of everything that is in ``directory``."""
    architecture, weights = contents.architecture, contents.weights
    return Manifest(
        glmexport=__version__,
        family=architecture.family,
        context_length=architecture.context_length,
        source=contents.source,
        recipe=contents.recipe,
        target=contents.target,
        calibration=contents.calibration,
        precision=_precision(architecture, weights),
        cache=cache,
        matrices=tuple(contents.records),
        tensors=stored_tensors(graphs[SCORING]),
        allocation=tuple(contents.allocation),
        experts=coverage(contents.records),
        draft=_draft(architecture, weights, tuple(contents.draft_records), graphs),
        # Other types hold every number that the original's does.
        largest_activation=contents.largest if contents.target.graph.activations == "float16" else None,
        arithmetic=contents.arithmetic,
        files=list_files(directory),
    )


def graphs_of(architecture: Architecture, limits: GraphLimits) -> dict[str, ir.Model]:
    """Return the graphs of a bundle by their files, before they are lowered."""
    if limits.static_shapes:
        chunk = fixed_sizes(architecture, limits).chunk
        positions = {MODEL: chunk, STEP: 1, SCORING: chunk}
        return {
            name: build_fixed(architecture, limits, count, every_position=name == SCORING)
            for name, count in positions.items()
        }
    graphs = {name: build_graph(architecture, limits, every_position=name == SCORING) for name in (MODEL, SCORING)}
    if architecture.token_prediction:
        graphs[DRAFT] = build_draft(architecture, limits)
    return graphs


def _draft(
    architecture: Architecture,
    weights: Weights,
    records: tuple[QuantizedMatrix, ...],
    graphs: Mapping[str, ir.Model],
) -> DraftGraph | None:
    draft = architecture.token_prediction
    if draft is None:
        return None
    bits = sum(stored_bits(shape, weights.form(key)) for key, shape in draft.own_shapes().items())
    return DraftGraph(file=DRAFT, weight_bytes=bits // 8, matrices=records, tensors=stored_tensors(graphs[DRAFT]))


def _precision(architecture: Architecture, weights: Weights) -> Precision:
    """Count the bits of every weight in its stored form; the rotary tables are computed and do not count."""
    shapes = architecture.shapes()
    bits = {key: stored_bits(shape, weights.form(key)) for key, shape in shapes.items()}
    linears = {linear.weight for _, linear in architecture.linears} - {architecture.lm_head.weight}
    embedding = bits[architecture.embedding]
    other = sum(bits.values()) - (0 if architecture.tied else embedding)
    row = embedding // architecture.vocabulary_size
    # A token passes only the experts that it chose.
    for layer in architecture.layers:
        routed = sum(bits[key] for key in layer.mlp.routed)
        other -= round(routed * (1 - layer.mlp.routed_share))
    return Precision(
        bits_per_weight=sum(bits.values()) / sum(math.prod(shape) for shape in shapes.values()),
        bits_per_weight_linears=sum(bits[key] for key in linears) / sum(math.prod(shapes[key]) for key in linears),
        weight_bytes=sum(bits.values()) // 8,
        bytes_per_decoded_token=(other + row) // 8,
    )


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
