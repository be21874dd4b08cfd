"""The plan of formats: the format of every matrix under a recipe, decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from glmexport.architecture.description import Architecture
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.formats.codecs import stored_bits
from glmexport.foundation.recipe import Format, Recipe
from glmexport.foundation.target import WeightFormats

#: Most bits of a matrix whose calibration text may be rounded: what 8 bits lose is no more than what bf16 does.
_MOST_COARSE_BITS = 4
_NOTHING: Mapping[str, Format] = MappingProxyType({})


@dataclass(frozen=True)
class FormatPlan:
    """The format of every matrix that can have one, by weight key; None: full precision.

    One table that is embedding and lm_head has one format, that of the embedding: its codes are fixed before the
    lm_head has activations to be fitted to. The keys include the own matrices of a layer that drafts.
    """

    formats: Mapping[str, Format | None]
    #: The keys of matrices that anything is multiplied by: all but a table that rows are only looked up in.
    multiplied: frozenset[str]
    #: The keys of tables that rows are looked up in.
    looked_up: frozenset[str]
    #: The number of columns of every matrix.
    columns: Mapping[str, int] = field(repr=False)

    @classmethod
    def of(cls, architecture: Architecture, recipe: Recipe, stored: Mapping[str, Format] = _NOTHING) -> FormatPlan:
        """Return the plan of ``recipe`` for ``architecture``.

        Args:
            architecture: the architecture, with the layer that drafts if the bundle will have it.
            recipe: the recipe as it is fitted to the target (``fitted``).
            stored: the format of each matrix that a quantized checkpoint stores so (``stored_formats``). A recipe that
                keeps them keeps every other linear in full precision.
        """
        routed, draft = architecture.routed, architecture.token_prediction
        linears = {linear.weight: linear for _, linear in architecture.linears}
        tables = {"lm_head": recipe.lm_head, "embedding": recipe.embedding}
        every = recipe.linear(mixture=bool(routed), routed=False)
        formats = {key: recipe.linear(mixture=bool(routed), routed=key in routed) for key in linears}
        columns = {key: linear.in_features for key, linear in linears.items()}
        looked_up, heads = {architecture.embedding}, {architecture.lm_head.weight}
        if draft is not None:
            # The layer has the format of all matrices that each token passes.
            every = recipe.linear(mixture=True, routed=False)
            formats |= {linear.weight: tables.get(linear.part, every) for linear in draft.matrices}
            columns |= {linear.weight: linear.in_features for linear in draft.matrices}
            looked_up |= {linear.weight for linear in draft.matrices if linear.part == "embedding"}
            heads |= {linear.weight for linear in draft.matrices if linear.part == "lm_head"}
            linears |= {linear.weight: linear for linear in draft.matrices if linear.part != "embedding"}
        formats |= {architecture.lm_head.weight: recipe.lm_head, architecture.embedding: recipe.embedding}
        if recipe.keeps_stored:
            by_recipe = looked_up | heads
            formats = {key: stored.get(key, form if key in by_recipe else None) for key, form in formats.items()}
        columns[architecture.embedding] = architecture.hidden_size
        return cls(formats, frozenset(linears), frozenset(looked_up), columns)

    def form(self, key: str) -> Format | None:
        """Return the format of the tensor with that key; None where it stays as it is."""
        return self.formats.get(key)

    def quantized(self) -> dict[str, Format]:
        """Return the format of every matrix that has one, by weight key."""
        return {key: form for key, form in self.formats.items() if form is not None}

    def chosen(self, formats: Mapping[str, Format]) -> FormatPlan:
        """Return the plan with the formats that a budget gave to some of the matrices."""
        return replace(self, formats={**self.formats, **formats})

    def bits(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bits that tensors of these ``shapes`` take, each stored once."""
        return sum(stored_bits(shape, self.form(key)) for key, shape in shapes.items())


def allows_coarse(architecture: Architecture, recipe: Recipe) -> bool:
    """Return whether calibration text may pass the blocks in bf16: every matrix that is solved in them has few bits.

    Under a budget any of them may have more, which is not known before the text has passed.
    """
    plan = FormatPlan.of(architecture, recipe)
    forms = [plan.form(linear.weight) for layer, linear in architecture.linears if layer is not None]
    if not recipe.needs_calibration or recipe.budget is not None:
        return False
    return all(form is None or form.bits <= _MOST_COARSE_BITS for form in forms)


def stored_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Return the format of every matrix that ``checkpoint`` stores quantized, as a bundle keeps it, by weight key."""
    return {key: form.exact for key, form in checkpoint.quantized.items()}


def fitted(recipe: Recipe, architecture: Architecture, offered: WeightFormats) -> Recipe:
    """Return ``recipe`` with one format for one table, where a target's products have no zero points.

    Rows of an embedding may have them, and recipes for such targets make use of it; a table that is multiplied by as
    well has the format that the recipe gives to the lm_head.
    """
    embedding, head = recipe.embedding, recipe.lm_head
    if not (architecture.tied and offered.symmetric_only and embedding and head):
        return recipe
    if embedding.symmetric or not head.symmetric or architecture.hidden_size % head.group_size:
        return recipe
    return recipe.model_copy(update={"embedding": head})
