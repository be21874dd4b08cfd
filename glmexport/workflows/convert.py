"""A finished bundle as a checkpoint of another format, for runtimes that do not read ONNX."""

from __future__ import annotations

import shutil
from pathlib import Path

from glmexport.assembly.gptq import QUANTIZE_CONFIG, GptqCheckpoint, Layout
from glmexport.assembly.read import BundleWeights, bundle_folds
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.names import SCORING
from glmexport.checkpoint.checkpoint import GENERATION_CONFIG
from glmexport.foundation.disk import require_free
from glmexport.foundation.progress import Progress
from glmexport.release.opening import NOBODY, Trust
from glmexport.workflows.checks import refuse_existing
from glmexport.workflows.matching import (
    check_original,
    refuse_other_model,
)
from glmexport.workflows.original import Original
from glmexport.workflows.output import partial_of, put_in_place

_KIND = "a GPTQ checkpoint"


def convert_to_gptq(
    bundle: Bundle,
    original: Original,
    output: Path,
    *,
    layout: Layout,
    force: bool,
    trust: Trust = NOBODY,
    progress: Progress,
) -> GptqCheckpoint:
    """Write the linears of ``bundle`` in the GPTQ format, with everything else as ``original`` has it.

    Args:
        bundle: a bundle that was built from ``original``.
        original: its checkpoint.
        output: the directory that the checkpoint ends in; it is complete when it appears there.
        layout: whose names and shapes to write.
        force: replace a GPTQ checkpoint that exists there.
        trust: whose signature the bundle has to have.
        progress: who watches.

    Raises:
        BundleError: the bundle was made from another checkpoint, or its files are not those of its manifest.
        UnverifiedError: the bundle is not what was signed, or nobody of ``trust`` signed it.
        InputError: ``output`` exists and may not be replaced, or the format cannot hold the bundle's matrices.
        MachineError: the disk has too little space, or a file cannot be read or written.
    """
    refuse_existing(output, force, QUANTIZE_CONFIG, _KIND)
    refuse_other_model(bundle, original)
    # What the graph says decides whether the format can hold it, and how much space that takes.
    bundle.require_file(SCORING)
    weights = BundleWeights(bundle.directory, original.architecture)
    folded = original.checkpoint.folded(bundle_folds(bundle.directory))
    checkpoint = GptqCheckpoint(weights, folded, original.architecture, layout)
    require_free(output.parent, checkpoint.bytes, "The checkpoint")
    check_original(bundle, original, progress, trust)
    files = list(original.tokenizer.files)
    if original.checkpoint.generation_config is not None:
        files.append(original.checkpoint.path / GENERATION_CONFIG)
    partial = partial_of(output)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        checkpoint.write(partial, files, progress)
        original.checkpoint.refuse_changes()
        refuse_existing(output, force, QUANTIZE_CONFIG, _KIND)
        put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return checkpoint
