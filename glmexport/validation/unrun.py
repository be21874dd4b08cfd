"""What can be said of a bundle whose execution provider this machine does not have: everything but how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.architecture import Reference
from glmexport.bundle import Manifest
from glmexport.calibration import Document
from glmexport.checkpoint import Checkpoint, Tokenizer
from glmexport.host import Host
from glmexport.progress import Progress
from glmexport.validation.gates import manifest_gates, prompt_gate, verdict_of, weight_gates
from glmexport.validation.host_gates import provider_gate
from glmexport.validation.prompts import golden_prompts, prompt_parity
from glmexport.validation.results import Gate, Verdict
from glmexport.validation.weights import check_weights


@dataclass(frozen=True)
class Unrun:
    """Gates that need no run, and the one that says that there was none, so that the verdict is never PASS."""

    gates: tuple[Gate, ...]
    verdict: Verdict
    #: What the machine lacks, a sentence each.
    lacking: tuple[str, ...]


def can_run(manifest: Manifest) -> bool:
    """Whether this machine has the execution provider of the bundle's target."""
    return manifest.target.provider.name in Host.this().providers


def validate_unrun(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    reference: Reference,
    documents: Sequence[Document],
    progress: Progress,
) -> Unrun:
    """Read every number of the graph back and compare it, and every prompt's tokens; run nothing."""
    weights = check_weights(directory, manifest, reference, progress)
    prompts = prompt_parity(golden_prompts(checkpoint, documents), Tokenizer.open(directory))
    gates: tuple[Gate, ...] = (provider_gate(manifest), *weight_gates(weights))
    if prompts:
        gates += (prompt_gate(prompts),)
    gates += manifest_gates(manifest)
    return Unrun(gates, verdict_of(gates), tuple(manifest.target.lacking(Host.this())))
