"""Matrices of a compressed-tensors checkpoint: fp8 numbers, and integers packed into words or a byte each.

For a linear with K inputs and N outputs, of ``b`` bits, with G scales a row:

    weight_packed       int32 [N, ceil(K b / 32)]   32 / b consecutive inputs a word, the first in the lowest bits
    weight              int8 [N, K] instead, or fp8 [N, K]
    weight_shape        int64 [2]                   N and K
    weight_scale        [N, G], [N, 1] or [1]       in any floating-point type
    weight_zero_point   int32 [ceil(N b / 32), G]   consecutive outputs a word; int8 [N, G] beside int8 weights, and
                                                    in files of before
    weight_g_idx        int32 [K], optional         the group of every input

Numbers are signed in the library, and 2^(b-1) is added to what is packed: the code and zero point of before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmexport.checkpoint.codes import WORD_BITS, CodedMatrix, CodeFormat, Codes, read_each, read_entry, unpacked
from glmexport.checkpoint.compressed import CompressedSettings
from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.checkpoint.packed import refuse_reordered
from glmexport.checkpoint.parts import FP8, ScaledMatrix, scaled_matrix
from glmexport.foundation.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_PACKED, _SCALE = ".weight_packed", ".weight_scale"
_AGAIN = "Download the checkpoint again, or quantize the model again."


@dataclass(frozen=True)
class CompressedMatrix(CodedMatrix):
    """One matrix [rows, columns] of integers."""

    layout: ClassVar[str] = "compressed-tensors"
    module: str
    form: CodeFormat
    rows: int
    columns: int
    #: I32 words, or I8 numbers.
    weight: TensorEntry
    scale: TensorEntry
    #: None where all zero points are the middle.
    zero_point: TensorEntry | None
    #: Tensors that were read when it was opened: its shape, and the group of every input.
    opened: tuple[TensorEntry, ...]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of."""
        return (self.weight, self.scale, *((self.zero_point,) if self.zero_point else ()), *self.opened)

    @property
    def scale_entry(self) -> TensorEntry:
        """The scales."""
        return self.scale

    def stored_rows(self, start: int, stop: int) -> Codes:
        """Return rows [start, stop) by stored group.

        Raises:
            CheckpointError: a number has more bits than the configuration says.
            MachineError: a shard cannot be read, or there is not enough memory.
        """
        rows, bits = slice(start, stop), self.form.bits
        if self.weight.dtype == "I32":
            codes = unpacked(read_entry(self.weight, rows), bits, axis=1)[:, : self.columns]
        else:
            codes = self._unsigned(self.weight, rows)
        if self.scale.elements == 1:
            scales = read_entry(self.scale).reshape(1, 1).expand(stop - start, 1)
        else:
            scales = read_entry(self.scale, rows).reshape(stop - start, -1)
        return Codes(codes, scales, self._zero_points(start, stop, scales))

    def _zero_points(self, start: int, stop: int, scales: Tensor) -> Tensor:
        import torch

        bits, entry = self.form.bits, self.zero_point
        if entry is None:
            return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        if entry.dtype == "I8":
            return self._unsigned(entry, slice(start, stop))
        fields = WORD_BITS // bits
        first = start // fields
        words = read_entry(entry, slice(first, -(-stop // fields)))
        points: Tensor = unpacked(words, bits, axis=0)[start - first * fields : stop - first * fields]
        return points

    def _unsigned(self, entry: TensorEntry, rows: slice) -> Tensor:
        import torch

        middle = 2 ** (self.form.bits - 1)
        numbers = read_entry(entry, rows).to(torch.int16) + middle
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2 * middle:
            raise CheckpointError(
                f"{entry.path}: {entry.name} has numbers outside of {-middle} to {middle - 1}, which are all that "
                f"{self.form.bits} bits hold.",
                next_step="Use the config.json that belongs to these weights.",
            )
        unsigned: Tensor = numbers.to(torch.uint8)
        return unsigned


def compressed_matrices(
    tensors: Mapping[str, TensorEntry], settings: CompressedSettings
) -> dict[str, CompressedMatrix | ScaledMatrix]:
    """Return every quantized matrix by the name of its module.

    Args:
        tensors: all tensors of the checkpoint.
        settings: what config.json says of them.

    Raises:
        CheckpointError: a tensor is missing or of another shape or dtype than the configuration says, columns were
            reordered, or an expression of the configuration takes too long.
        MachineError: a shard cannot be read.
    """
    found: dict[str, CompressedMatrix | ScaledMatrix] = {}
    packed = [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]
    names = [f"{module}.weight_shape" for module in packed]
    shapes = {
        entry.name.removesuffix(".weight_shape"): tuple(stored.long().flatten().tolist())
        for entry, stored in read_each(tensors[name] for name in names if name in tensors and _is_shape(tensors[name]))
    }
    for module in packed:
        found[module] = _integers(module, tensors[module + _PACKED], tensors, settings, shapes.get(module))
    for name, entry in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or entry.dtype not in (FP8, "I8"):
            continue
        if module in found:
            raise CheckpointError(
                f"The checkpoint has {module} twice, as {name} and as {module}{_PACKED}.", next_step=_AGAIN
            )
        if entry.dtype == "I8":
            found[module] = _integers(module, entry, tensors, settings, entry.shape)
        else:
            found[module] = _scaled(module, entry, tensors, settings)
    _refuse_leftovers(tensors, found, settings)
    refuse_reordered(
        [
            (entry, matrix.span)
            for matrix in found.values()
            if isinstance(matrix, CompressedMatrix)
            for entry in matrix.opened
            if entry.name.endswith("_g_idx")
        ]
    )
    return found


def _is_shape(entry: TensorEntry) -> bool:
    return entry.dtype in ("I64", "I32") and entry.shape == (2,)


def _scaled(
    module: str, weight: TensorEntry, tensors: Mapping[str, TensorEntry], settings: CompressedSettings
) -> ScaledMatrix:
    factors = _scale(module, weight, tensors)
    matrix = scaled_matrix(weight, factors, settings.block)
    if matrix is None:
        raise _unexpected(factors, weight, "a scale for each of its rows, for each of its blocks, or one")
    return matrix


def _integers(
    module: str,
    weight: TensorEntry,
    tensors: Mapping[str, TensorEntry],
    settings: CompressedSettings,
    shape: tuple[int, ...] | None,
) -> CompressedMatrix:
    form = settings.form_of(module)
    scale = _scale(module, weight, tensors)
    zero_point = tensors.get(f"{module}.weight_zero_point")
    if len(weight.shape) != 2 or weight.dtype not in ("I32", "I8"):
        raise _unexpected(weight, weight, "a matrix of I32 words or I8 numbers")
    fields = WORD_BITS // form.bits
    rows, columns = shape if shape is not None and len(shape) == 2 else (weight.shape[0], weight.shape[1] * fields)
    width = columns if weight.dtype == "I8" else -(-columns // fields)
    if (rows, width) != weight.shape or columns <= 0:
        raise CheckpointError(
            f"{weight.path}: {weight.name} has shape {list(weight.shape)}, which does not hold {rows} x {columns} "
            f"weights of {form.bits} bits, as weight_shape and num_bits have it.",
            next_step="Use the config.json that belongs to these weights.",
        )
    groups = 1 if form.group_size == -1 else -(-columns // form.group_size)
    scale_shapes = [(rows, groups), *([(rows,), (1,), ()] if groups == 1 else [])]
    if scale.shape not in scale_shapes or scale.dtype not in WEIGHT_DTYPES:
        raise _unexpected(scale, weight, f"{groups} scales a row, for {form.label},")
    if (zero_point is None) != form.symmetric:
        raise CheckpointError(
            f"{settings.where} says that the weights of {module} are {'' if form.symmetric else 'not '}symmetric, and "
            f"the checkpoint has {'a' if form.symmetric else 'no'} {module}.weight_zero_point.",
            next_step="Use the config.json that belongs to these weights.",
        )
    if zero_point is not None and (zero_point.dtype, zero_point.shape) not in (
        ("I32", (-(-rows // fields), groups)),
        ("I8", (rows, groups)),
    ):
        raise _unexpected(zero_point, weight, f"{groups} zero points a row, for {form.label},")
    read = [tensors[key] for end in ("shape", "g_idx") if (key := f"{module}.weight_{end}") in tensors]
    for entry in read:
        if entry.name.endswith("_g_idx") and (entry.dtype not in ("I32", "I64") or entry.shape != (columns,)):
            raise _unexpected(entry, weight, f"the group of each of {columns} inputs")
    return CompressedMatrix(module, form, rows, columns, weight, scale, zero_point, tuple(read))


def _scale(module: str, weight: TensorEntry, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    scale = tensors.get(module + _SCALE)
    if scale is None:
        raise CheckpointError(
            f"{weight.path}: {weight.name} is {weight.dtype}, and there is no {module}{_SCALE}.", next_step=_AGAIN
        )
    return scale


def _refuse_leftovers(
    tensors: Mapping[str, TensorEntry],
    found: Mapping[str, CompressedMatrix | ScaledMatrix],
    settings: CompressedSettings,
) -> None:
    """Refuse scales without a quantized matrix, and a configuration without any."""
    for name, entry in tensors.items():
        if name.endswith((_SCALE, ".weight_zero_point")) and name.rpartition(".")[0] not in found:
            weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
            shown = "absent" if weight is None else f"{weight.dtype} {list(weight.shape)}"
            raise CheckpointError(f"{entry.path}: {name} is the scale of a matrix that is {shown}.", next_step=_AGAIN)
    if not found:
        raise CheckpointError(
            f"{settings.where} says that the checkpoint is quantized by compressed-tensors, and no tensor is "
            f"*{_PACKED}, fp8 or int8.",
            next_step="Download the weights again.",
        )


def _unexpected(entry: TensorEntry, weight: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.path}: {entry.name} is {entry.dtype} {list(entry.shape)}, and {weight.name} is {weight.dtype} "
        f"{list(weight.shape)}; {expected} is expected.",
        next_step="Use the config.json that belongs to these weights.",
    )
