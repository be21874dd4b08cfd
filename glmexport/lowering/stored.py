"""Where a lowered graph holds each quantized matrix: noted by the pass that puts it there, read by the manifest."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from glmexport.bundle.records import StoredTensor
from glmexport.foundation.recipe import Format

_STORED = "glmexport.stored"


def note_stored(
    keys: list[str], form: Format, parts: dict[str, ir.Value], layout: Literal["packed", "columns"] = "packed"
) -> None:
    """Note that the initializers ``parts`` hold the matrices ``keys`` as ``form``, one below the other.

    Args:
        keys: checkpoint keys.
        form: of what is stored.
        parts: by what they hold, codes first.
        layout: as in ``StoredTensor``.
    """
    names = {part: str(value.name) for part, value in parts.items()}
    parts["codes"].meta[_STORED] = StoredTensor(matrices=tuple(keys), format=form, parts=names, layout=layout)


def stored_tensors(model: ir.Model) -> tuple[StoredTensor, ...]:
    """Return what was noted of ``model``, in the order in which its passes put it there."""
    notes = (value.meta.get(_STORED) for value in model.graph.initializers.values())
    return tuple(note for note in notes if note is not None)


def stacked_name(keys: list[str]) -> str:
    """Return one name for stacked tensors: ``...self_attn.q_proj+k_proj+v_proj.weight``."""
    if len(keys) == 1:
        return keys[0]
    parts = [key.rsplit(".", 2) for key in keys]
    return f"{parts[0][0]}.{'+'.join(part[1] for part in parts)}.{parts[0][2]}"
