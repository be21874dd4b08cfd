"""What can be said of a bundle whose execution provider this machine does not have: everything but how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.manifest import Manifest
from glmexport.calibration.corpus import Document
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.host import Host
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.gates import manifest_gates, prompt_gate, reference_gate, verdict_of, weight_gates
from glmexport.validation.host_gates import provider_gate
from glmexport.validation.prompts import golden_prompts, prompt_parity
from glmexport.validation.texts import evaluation_texts
from glmexport.validation.weights import check_weights
from glmexport.validation.whole_model import check_reference

#: Tokens of the text that the original is checked on.
_LONGEST = 128


@dataclass(frozen=True)
class Unrun:
    """Gates that need no run, and the one that says that there was none, so that the verdict is never PASS."""

    gates: tuple[Gate, ...]
    verdict: Verdict
    #: What the machine lacks, a sentence each.
    lacking: tuple[str, ...]
    reference: ReferenceCheck




def validate_unrun(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    reference: Reference,
    documents: Sequence[Document],
    progress: Progress,
    max_memory_bytes: int | None = None,
) -> Unrun:
    """Read every number of the graph back and compare it, and every prompt's tokens; run nothing but the original."""
    tokenizer = Tokenizer.open(directory)
    longest = min(_LONGEST, reference.architecture.context_length)
    texts = evaluation_texts(documents, tokenizer, positions_per_language=_LONGEST, longest=longest)
    check = check_reference(reference, texts, directory, max_memory_bytes, progress)
    weights = check_weights(directory, manifest, reference, progress)
    prompts = prompt_parity(golden_prompts(checkpoint, documents), tokenizer)
    gates: tuple[Gate, ...] = (provider_gate(manifest), *reference_gate(check), *weight_gates(weights))
    if prompts:
        gates += (prompt_gate(prompts),)
    gates += manifest_gates(manifest)
    return Unrun(gates, verdict_of(gates), tuple(manifest.target.lacking(Host.this())), check)
