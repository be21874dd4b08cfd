"""An opened checkpoint with its description, and the parts of it that a bundle for a target takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from glmexport.architecture.description import Architecture
from glmexport.architecture.rope import context_remark
from glmexport.architecture.tables import remark_on
from glmexport.architecture.token_prediction import share_tables
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.plan import FormatPlan, stored_formats
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.graph.caches import own_loop
from glmexport.graph.fixed import fixed_sizes
from glmexport.reference.describe import describe
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.workflows.estimate import Planned
from glmexport.workflows.vocabulary import refuse_tokenizer

#: The reason why a bundle that onnxruntime-genai decodes has no draft graph.
NO_DRAFTS = (
    "predicts a token further ahead, for speculative decoding, and no answer depends on it; only glmexport's own loop "
    "drafts with it, and onnxruntime-genai runs this bundle"
)


@dataclass(frozen=True)
class Original:
    """An opened checkpoint, its description, its tokenizer, and the tensors that are left out and why."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer
    unused: dict[str, str]

    @classmethod
    def open(
        cls, source: str, progress: Progress, adapter: str | None = None, *, rehash: bool = False
    ) -> Original:
        """Open and check a checkpoint, with the adapter that is merged into it, if any; no weight is read.

        With ``rehash`` its digest, wherever one is taken, is of what is read then, and not one that is kept.
        """
        checkpoint = Checkpoint.open(source, progress, adapter)
        if rehash:
            checkpoint.forget_digest()
        architecture = describe(checkpoint)
        checkpoint = architecture.presented(checkpoint)
        unused = dict(architecture.account(checkpoint))
        if remark := remark_on(architecture, checkpoint):
            progress.remark(f"{checkpoint.name}: {remark}.")
        tokenizer = Tokenizer.open(checkpoint.path)
        refuse_tokenizer(checkpoint, architecture, tokenizer)
        for remark in filter(None, (tokenizer.remark, context_remark(checkpoint.config, architecture.context_length))):
            progress.remark(remark)
        return cls(checkpoint, architecture, tokenizer, unused)

    def sharing_tables(self) -> Original:
        """Return it with one embedding and one lm_head, where the layer that predicts further ahead stores copies.

        The tables are read to compare them.
        """
        architecture = share_tables(self.architecture, self.checkpoint)
        return replace(self, architecture=architecture, unused=dict(architecture.account(self.checkpoint)))

    def drafts(self, target: Target) -> bool:
        """Return whether a bundle for ``target`` can draft tokens by the layer that predicts further ahead."""
        return self.architecture.token_prediction is not None and own_loop(self.architecture, target.graph)

    def architecture_for(self, target: Target) -> Architecture:
        """Return the architecture of a bundle for ``target``, with the context that it has."""
        built = self.architecture if self.drafts(target) else replace(self.architecture, token_prediction=None)
        if not target.graph.static_shapes:
            return built
        return replace(built, context_length=fixed_sizes(built, target.graph).capacity)

    def planned(self, recipe: Recipe, target: Target) -> Planned:
        """Return what a bundle of ``recipe``, as ``recipe_for`` gives it, for ``target`` will consist of."""
        architecture = self.architecture_for(target)
        plan = FormatPlan.of(architecture, recipe, stored_formats(self.checkpoint))
        return Planned(architecture, recipe, target, plan)

    def unused_for(self, target: Target) -> dict[str, str]:
        """Return the tensors that a bundle for ``target`` leaves out, and why."""
        draft = self.architecture.token_prediction
        if draft is None or self.drafts(target):
            return self.unused
        return self.unused | dict.fromkeys(draft.own_shapes(), NO_DRAFTS)


def formats_of(original: Original) -> str:
    """Return by what a quantized checkpoint is quantized, its formats and how many matrices have each, for people."""
    counts = Counter(original.checkpoint.labels.values())
    layout = (original.checkpoint.stored.layout or "").lower()
    return ", ".join([layout, *(f"{count} x {label}" for label, count in counts.most_common())])


def listed_unused(unused: Mapping[str, str]) -> dict[str, str]:
    """Return unused tensors for people: those of one layer that are left out for one reason are one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, reason in unused.items():
        layer = re.match(r"model\.layers\.\d+\.", key)
        groups.setdefault((layer[0] if layer else key, reason), []).append(key)
    return {
        keys[0] if len(keys) == 1 else f"{name}* ({len(keys)} tensors)": reason
        for (name, reason), keys in groups.items()
    }
