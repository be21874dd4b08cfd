"""The part of a validation that needs no run of the bundle, for one whose provider or memory this machine lacks."""

from __future__ import annotations

from dataclasses import dataclass

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import lacking_memory
from glmexport.foundation.host import Host
from glmexport.foundation.progress import Progress
from glmexport.reference.reference import Reference
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.results.reference import ReferenceCheck
from glmexport.validation.gates import manifest_gates, prompt_gate, reference_gate, verdict_of, weight_gates
from glmexport.validation.host_gates import provider_gate
from glmexport.validation.prompts import golden_prompts, prompt_parity
from glmexport.validation.texts import EvaluationSet, evaluation_texts
from glmexport.validation.weights import check_weights
from glmexport.validation.whole_model import check_reference

#: Number of tokens of the text that the original is checked on.
_LONGEST = 128


@dataclass(frozen=True)
class Unrun:
    """The gates that need no run, and one that says that there was none, so that the verdict is never PASS."""

    gates: tuple[Gate, ...]
    verdict: Verdict
    #: The things that the machine lacks, a sentence each.
    lacking: tuple[str, ...]
    reference: ReferenceCheck


def validate_unrun(
    bundle: Bundle,
    reference: Reference,
    evaluation: EvaluationSet,
    progress: Progress,
    max_memory_bytes: int | None = None,
) -> Unrun:
    """Read every number of the graph back and compare it, and the tokens of every prompt; run nothing but the original.

    Args:
        bundle: the bundle.
        reference: its original.
        evaluation: text, a little of which the original is checked on.
        progress: the observer of the steps.
        max_memory_bytes: what this process may take at most; None: most of the memory that is free.
    """
    tokenizer, longest = bundle.tokenizer, min(_LONGEST, reference.architecture.context_length)
    texts = evaluation_texts(evaluation.documents, tokenizer, positions_per_language=_LONGEST, longest=longest)
    check = check_reference(reference, texts, bundle.directory, max_memory_bytes, progress)
    weights = check_weights(bundle, reference, progress)
    prompts = prompt_parity(golden_prompts(reference.checkpoint, evaluation), tokenizer)
    gates: tuple[Gate, ...] = (provider_gate(bundle), *reference_gate(check), *weight_gates(weights))
    if prompts:
        gates += (prompt_gate(prompts),)
    gates += manifest_gates(bundle.manifest)
    lacking = [*bundle.target.lacking(Host.this()), lacking_memory(bundle)]
    return Unrun(gates, verdict_of(gates), tuple(filter(None, lacking)), check)
