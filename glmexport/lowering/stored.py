"""The place of each quantized matrix in a lowered graph: noted by the pass that puts it there, read by the manifest."""

from __future__ import annotations

import math
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.bundle.records import StoredTensor
from glmexport.formats.codecs import codec_of
from glmexport.foundation.recipe import Format
from glmexport.lowering.rewrite import Rewrite
from glmexport.quantization.weights import Weights

_STORED = "glmexport.stored"


def stored_part(
    rewrite: Rewrite,
    weights: Weights,
    keys: list[str],
    part: str,
    name: str,
    *,
    flat: int | None = None,
    same_bytes_as: str | None = None,
) -> ir.Value:
    """Return an initializer that holds a part of quantized matrices, one below the other.

    Args:
        rewrite: of the node that reads it.
        weights: formats and numbers.
        keys: checkpoint keys of matrices of one format and width.
        part: codes, scales or zero_points, packed as the format's codec does.
        name: of the initializer.
        flat: how many axes to keep, the last ones being one; None: as the codec packs it.
        same_bytes_as: as for ``Rewrite.weight``.
    """
    form = weights.form(keys[0])
    assert form is not None
    rows, columns = sum(weights.shape(key)[0] for key in keys), weights.shape(keys[0])[1]
    shape = codec_of(form).shapes(rows, columns)[part]
    if flat is not None:
        shape = (*shape[: flat - 1], math.prod(shape[flat - 1 :]))
    dtype = ir.DataType.FLOAT16 if part == "scales" else ir.DataType.UINT8

    def numbers() -> NDArray[Any]:
        packed: NDArray[Any] = weights.packed(keys, part).reshape(shape).numpy()
        return packed

    return rewrite.weight(name, dtype, shape, numbers, same_bytes_as)


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
    values = {
        "matrices": tuple(keys),
        "format": form,
        "parts": {part: str(value.name) for part, value in parts.items()},
        "layout": layout,
    }
    parts["codes"].meta[_STORED] = StoredTensor.model_validate(values)


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
