"""Matrices in the GPTQ format: integers packed into int32 words, decoded a few rows at a time.

For a linear with K inputs and N outputs, of ``b`` bits, in groups of g inputs, G = ceil(K / g):

    qweight  int32 [ceil(K b / 32), N]    32 / b consecutive inputs a word, the first in the lowest bits
    qzeros   int32 [G, ceil(N b / 32)]    32 / b consecutive outputs a word; version 1 stores zero points minus one
    scales   fp16  [G, N]
    g_idx    int32 [K], optional          the group of every input; k // g unless columns were reordered (act-order)

The weight is (code - zero point) * scale. Version 1's zero points are corrected as GPTQModel does it, by adding one
to every field of the packed *word* with carries between fields: the subtraction that wrote them borrowed likewise,
so that a zero point of 0, stored as all ones, comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from glmexport.checkpoint.codes import (
    WORD_BITS,
    CodedMatrix,
    CodeFormat,
    Codes,
    read_each,
    read_entry,
    unpacked,
)
from glmexport.checkpoint.gptq import QUANTIZE_CONFIG, VERSIONS, GptqSettings
from glmexport.checkpoint.header import TensorEntry
from glmexport.foundation.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

QWEIGHT = ".qweight"
_AGAIN = "Download the checkpoint again, or quantize the model again."


@dataclass(frozen=True)
class PackedMatrix(CodedMatrix):
    """One matrix [rows, columns] in the GPTQ format."""

    layout: ClassVar[str] = "GPTQ"
    module: str
    form: CodeFormat
    #: The number that is added to stored zero points.
    offset: int
    rows: int
    columns: int
    qweight: TensorEntry
    qzeros: TensorEntry
    scales: TensorEntry
    g_idx: TensorEntry | None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of."""
        return (self.qweight, self.qzeros, self.scales, *((self.g_idx,) if self.g_idx else ()))

    @property
    def scale_entry(self) -> TensorEntry:
        """The scales [G, rows]."""
        return self.scales

    def stored_rows(self, start: int, stop: int) -> Codes:
        """Return rows [start, stop) by stored group.

        Raises:
            CheckpointError: the format is symmetric and a zero point is not its middle.
            MachineError: a shard cannot be read, or there is not enough memory.
        """
        rows = slice(start, stop)
        codes = unpacked(read_entry(self.qweight, columns=rows), self.form.bits, axis=0)[: self.columns]
        return Codes(codes.T, read_entry(self.scales, columns=rows).T, self.zero_points(start, stop).T)

    def zero_points(self, start: int, stop: int) -> Tensor:
        """Return the zero points [G, stop - start] uint8 of the stored groups; raises as ``decode`` does."""
        zero_points = self._zero_points(start, stop, self.offset)
        middle = 2 ** (self.form.bits - 1)
        if self.form.symmetric and not bool((zero_points == middle).all()):
            other = self._zero_points(start, stop, 1 - self.offset)
            stored = ("as they are (gptq_v2)", "minus one (gptq)")
            if bool((other == middle).all()):
                raise CheckpointError(
                    f"{self.qzeros.path}: {self.qzeros.name} stores zero points {stored[1 - self.offset]}, and the "
                    f"configuration says that they are stored {stored[self.offset]}.",
                    next_step="Correct checkpoint_format in config.json and quantize_config.json.",
                )
            raise CheckpointError(
                f"{self.qzeros.path}: the configuration says sym, and {self.qzeros.name} has zero points other than "
                f"{middle}.",
                next_step="Set sym to false in config.json and quantize_config.json if the model was quantized so.",
            )
        return zero_points

    def told_offset(self) -> int | None:
        """Return the number to add to the stored zero points for all to be the middle; None if they do not tell."""
        for offset in (0, 1):
            if bool((self._zero_points(0, self.rows, offset) == 2 ** (self.form.bits - 1)).all()):
                return offset
        return None

    def _zero_points(self, start: int, stop: int, offset: int) -> Tensor:
        import torch

        bits, fields = self.form.bits, WORD_BITS // self.form.bits
        first = start // fields
        words = read_entry(self.qzeros, columns=slice(first, -(-stop // fields))).long()
        one_in_each = sum(1 << (bits * field) for field in range(fields))
        words = (words + offset * one_in_each) & 0xFFFFFFFF
        shifts = torch.arange(fields) * bits
        unpacked = ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)
        zero_points: Tensor = unpacked[:, start - first * fields : stop - first * fields].to(torch.uint8)
        return zero_points


def refuse_reordered(groups: Collection[tuple[TensorEntry, int]]) -> None:
    """Check that every input belongs to the group of its position.

    Args:
        groups: The group of every input as stored, and the number of inputs in a group.

    Raises:
        CheckpointError: one does not (act-order), and no bundle can hold that exactly.
        MachineError: a shard cannot be read.
    """
    import torch

    spans = {entry.name: span for entry, span in groups}
    for entry, stored in read_each(entry for entry, _ in groups):
        if not torch.equal(stored.long(), torch.arange(len(stored)) // spans[entry.name]):
            raise CheckpointError(
                f"{entry.path}: {entry.name} assigns inputs to groups out of order (act-order, desc_act); "
                "a bundle stores groups of consecutive inputs only.",
                next_step="Quantize with desc_act=False (GPTQModel's act_group_aware keeps most of its gain), or build "
                "from the full-precision checkpoint.",
            )


def find_matrices(
    tensors: Mapping[str, TensorEntry], settings: GptqSettings | None, directory: Path
) -> dict[str, PackedMatrix]:
    """Return every quantized matrix by the name of its module, checked as far as no data of weights is needed for it.

    Args:
        tensors: all tensors of the checkpoint.
        settings: how they are quantized, where a file says so.
        directory: the checkpoint, for messages.

    Raises:
        CheckpointError: tensors and settings disagree on whether anything is quantized, a tensor is missing or of
            another shape or dtype, columns were reordered, or the zero points are not stored as the settings say.
        MachineError: a shard cannot be read.
    """
    modules = [name.removesuffix(QWEIGHT) for name in tensors if name.endswith(QWEIGHT)]
    if settings is None:
        if not modules:
            return {}
        raise CheckpointError(
            f"{directory} has {modules[0]}{QWEIGHT}, and neither config.json nor {QUANTIZE_CONFIG} says how it is "
            "quantized.",
            next_step=f"Put the {QUANTIZE_CONFIG} that belongs to these weights into the directory.",
        )
    if not modules:
        raise CheckpointError(
            f"{settings.where} says that the checkpoint is quantized by gptq, and no tensor is named *{QWEIGHT}.",
            next_step="Remove the entry if the weights are in full precision, or download the weights again.",
        )
    # All matrices of a checkpoint are of one version; where the configuration does not tell it and the zero points
    # cannot (asymmetric), it is version 1, the only one that was ever written without being named.
    offset = settings.zero_point_offset
    if offset is None:
        first = _matrix(modules[0], tensors, settings, VERSIONS["gptq"])
        told = first.told_offset() if first.form.symmetric else None
        offset = first.offset if told is None else told
    matrices = {module: _matrix(module, tensors, settings, offset) for module in modules}
    first = matrices[modules[0]]
    first.zero_points(0, first.rows)
    refuse_reordered([(matrix.g_idx, matrix.span) for matrix in matrices.values() if matrix.g_idx])
    return matrices


def _matrix(module: str, tensors: Mapping[str, TensorEntry], settings: GptqSettings, offset: int) -> PackedMatrix:
    form = settings.format_of(module)
    if form is None:
        raise CheckpointError(
            f"{settings.where}: dynamic leaves out {module}, and the checkpoint has {module}{QWEIGHT}.",
            next_step=_AGAIN,
        )
    found = {name: tensors.get(f"{module}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx", "weight")}
    qweight, qzeros, scales, g_idx = found["qweight"], found["qzeros"], found["scales"], found["g_idx"]
    if qweight is None or qzeros is None or scales is None:
        missing = next(name for name in ("qweight", "qzeros", "scales") if found[name] is None)
        raise CheckpointError(
            f"{tensors[module + QWEIGHT].path}: {module} has {QWEIGHT[1:]} and no {missing}.", next_step=_AGAIN
        )
    if found["weight"] is not None:
        raise CheckpointError(
            f"The checkpoint has {module} twice, as {module}.weight and as {module}{QWEIGHT}.", next_step=_AGAIN
        )
    if len(qweight.shape) != 2:
        raise _unexpected(qweight, "two axes")
    fields = WORD_BITS // form.bits
    rows = qweight.shape[1]
    columns = g_idx.shape[0] if g_idx is not None and len(g_idx.shape) == 1 else qweight.shape[0] * fields
    groups = 1 if form.group_size == -1 else -(-columns // form.group_size)
    for entry, dtype, shape in (
        (qweight, "I32", (-(-columns // fields), rows)),
        (qzeros, "I32", (groups, -(-rows // fields))),
        (scales, "F16", (groups, rows)),
        (g_idx, "I32", (columns,)),
    ):
        if entry is not None and (entry.dtype, entry.shape) != (dtype, shape):
            raise _unexpected(entry, f"{dtype} {list(shape)}, for {form.bits} bits and group_size {form.group_size},")
    return PackedMatrix(module, form, offset, rows, columns, qweight, qzeros, scales, g_idx)


def _unexpected(entry: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.path}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {expected} is expected.",
        next_step="Use the config.json and quantize_config.json that belong to these weights.",
    )
