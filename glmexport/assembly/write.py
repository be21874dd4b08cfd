"""A bundle on disk: graphs, weights, tokenizer, configuration and manifest, in a directory of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
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

#: Of a bundle that is being written.
_CALIBRATION = "calibration.onnx"


def write_bundle(
    directory: Path,
    architecture: Architecture,
    weights: Weights,
    rotary_tables: tuple[torch.Tensor, torch.Tensor],
    *,
    recipe: Recipe,
    target: Target,
    source: Source,
    calibration: CalibrationSource | None,
    records: Iterable[QuantizedMatrix],
    allocation: Iterable[AllocatedGroup] = (),
    draft_records: Iterable[QuantizedMatrix] = (),
    largest: LargestActivation | None = None,
    tokenizer_files: Iterable[Path],
    cache_text: Sequence[Sequence[int]] = (),
    progress: Progress,
) -> Manifest:
    """Write the bundle into ``directory``, which must not exist; the same arguments give the same bytes.

    The manifest is written last, so a directory without one is not a bundle. Returns it. ``cache_text``: token ids that
    the scales of a quantized cache are calibrated on.
    """
    directory.mkdir(parents=True)
    limits = target.graph
    built = graphs_of(architecture, limits)
    graphs = {name: lower(graph, target, weights, rotary_tables) for name, graph in built.items()}
    cache = None
    if limits.kv_cache == "activations":
        write_graphs(graphs, directory, progress, target.memory.max_file_bytes)
    else:
        # The same graph with a cache of floats, over the same weights, tells what has to be quantized.
        floats = target.model_copy(update={"graph": limits.model_copy(update={"kv_cache": "activations"})})
        plain = lower(build_graph(architecture, floats.graph, every_position=False), floats, weights, rotary_tables)
        write_graphs({**graphs, _CALIBRATION: plain}, directory, progress, target.memory.max_file_bytes)
        scales = calibrate_caches(directory / _CALIBRATION, architecture, limits, cache_text, progress)
        (directory / _CALIBRATION).unlink()
        for name, model in graphs.items():
            set_scales(model, scales)
            ir.save(model, directory / name)
        cache = CacheQuantization(
            format=limits.kv_cache,
            scales=limits.kv_scales,
            sequences=len(cache_text),
            tokens=sum(map(len, cache_text)),
        )
    if weights.checkpoint.folds:
        save_file(as_tensors(weights.checkpoint.folds), directory / FOLDS)
    name, config = loop_config(architecture, target)
    (directory / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = list(tokenizer_files)
    for file in files:
        # Copied, not linked: runtimes refuse links that leave the directory. The first is tokenizer.json;
        # further chat templates are in a folder beside it.
        copy = directory / file.relative_to(files[0].parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _flush(path)
    matrices = tuple(records)
    manifest = Manifest(
        glmexport=__version__,
        family=architecture.family,
        context_length=architecture.context_length,
        source=source,
        recipe=recipe,
        target=target,
        calibration=calibration,
        precision=_precision(architecture, weights),
        cache=cache,
        matrices=matrices,
        tensors=stored_tensors(graphs[SCORING]),
        allocation=tuple(allocation),
        experts=coverage(matrices),
        draft=_draft(architecture, weights, tuple(draft_records), graphs),
        # Another type holds whatever the original's does.
        largest_activation=largest if limits.activations == "float16" else None,
        files=list_files(directory),
    )
    write_atomically(directory / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def graphs_of(architecture: Architecture, limits: GraphLimits) -> dict[str, ir.Model]:
    """The graphs of a bundle by their files, before they are lowered."""
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
    """Bits of every weight, whatever it is stored as; the rotary tables are computed and do not count."""
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
