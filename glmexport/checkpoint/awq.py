"""Matrices in AWQ's layout "gemm", and the configuration that says so.

For a linear with K inputs and N outputs, in groups of g inputs, at 4 bits:

    qweight  int32 [K, N / 8]        8 consecutive outputs a word: from the lowest bits on, 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32 [K / g, N / 8]    likewise; zero points as they are
    scales   fp16 or bf16 [K / g, N]

AutoAWQ writes it (``quant_method`` "awq", ``version`` "gemm"), and GPTQModel, which calls the version ``format``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmexport.checkpoint.codes import (
    GROUP_SIZES,
    WORD_BITS,
    CodedMatrix,
    CodeFormat,
    Codes,
    holds_groups,
    read_entry,
    unpacked,
)
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.header import TensorEntry
from glmexport.foundation.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_QWEIGHT = ".qweight"
_BITS = 4
_FIELDS = WORD_BITS // _BITS
#: The field of a word that each of its outputs is in.
_FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
_VERSIONS = ("version", "checkpoint_format", "format")
_FULL = "Give the full-precision checkpoint of this model, or an AWQ checkpoint of version gemm and 4 bits."


@dataclass(frozen=True)
class AwqMatrix(CodedMatrix):
    """One matrix [rows, columns] in AWQ's layout."""

    layout: ClassVar[str] = "AWQ"
    module: str
    form: CodeFormat
    rows: int
    columns: int
    qweight: TensorEntry
    #: None where all zero points are the middle.
    qzeros: TensorEntry | None
    scales: TensorEntry

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it consists of."""
        return (self.qweight, self.scales, *((self.qzeros,) if self.qzeros else ()))

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
        import torch

        middle = 2 ** (_BITS - 1)
        scales = read_entry(self.scales, columns=slice(start, stop)).T
        if self.qzeros is None:
            zero_points = torch.full(scales.shape, middle, dtype=torch.uint8)
        else:
            zero_points = _outputs(self.qzeros, start, stop).T
        if self.qzeros is not None and self.form.symmetric and not bool((zero_points == middle).all()):
            raise CheckpointError(
                f"{self.qzeros.path}: the configuration says zero_point false, and {self.qzeros.name} has zero points "
                f"other than {middle}.",
                next_step="Set zero_point to true in config.json if the model was quantized so.",
            )
        return Codes(_outputs(self.qweight, start, stop).T, scales, zero_points)


def _outputs(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Return outputs [start, stop) of packed words, [rows of the tensor, stop - start] uint8."""
    first = start // _FIELDS
    fields = unpacked(read_entry(entry, columns=slice(first, -(-stop // _FIELDS))), _BITS, axis=1)
    ordered = fields.reshape(len(fields), -1, _FIELDS)[:, :, list(_FIELD_OF_OUTPUT)].flatten(1)
    outputs: Tensor = ordered[:, start - first * _FIELDS : stop - first * _FIELDS]
    return outputs


def awq_matrices(tensors: Mapping[str, TensorEntry], tables: Sequence[ConfigReader]) -> dict[str, AwqMatrix]:
    """Return every quantized matrix by the name of its module, as far as no data is needed for it.

    Args:
        tensors: all tensors of the checkpoint.
        tables: what config.json, and a file beside it, say of the quantization.

    Raises:
        CheckpointError: another version than gemm, a format without an exact counterpart here, two files that
            contradict each other, or a tensor that is missing or of another shape or dtype.
    """
    forms = [_form(table) for table in tables]
    if len(set(forms)) > 1:
        raise CheckpointError(
            f"{tables[0].where} says {forms[0].label}, and {tables[1].where} says {forms[1].label}.",
            next_step="Correct or remove the one that does not belong to these weights.",
        )
    modules = [name.removesuffix(_QWEIGHT) for name in tensors if name.endswith(_QWEIGHT)]
    if not modules:
        raise CheckpointError(
            f"{tables[0].where} says that the checkpoint is quantized by AWQ, and no tensor is named *{_QWEIGHT}.",
            next_step="Download the weights again.",
        )
    return {module: _matrix(module, tensors, forms[0]) for module in modules}


def _form(table: ConfigReader) -> CodeFormat:
    # The first versions of AutoAWQ had their own names.
    bits = table.integer("bits" if table.has("bits") else "w_bit", default=_BITS)
    group_size = table.integer("group_size" if table.has("group_size") else "q_group_size")
    versions = {table.text(key).lower() for key in _VERSIONS if table.has(key)} or {"gemm"}
    for key, value, wrong, accepted in (
        ("bits", bits, bits != _BITS, str(_BITS)),
        ("group_size", group_size, not holds_groups(group_size), GROUP_SIZES),
        ("version", " and ".join(sorted(versions)), versions != {"gemm"}, "gemm"),
    ):
        if wrong:
            raise CheckpointError(
                f"{table.where}: {key} is {value} in a checkpoint quantized by AWQ; accepted is {accepted}.",
                next_step=_FULL,
            )
    table.choice("pack_dtype", ("int32",), default="int32")
    symmetric = not table.flag("zero_point") if table.has("zero_point") else table.flag("sym", default=False)
    return CodeFormat(bits, group_size, symmetric)


def _matrix(module: str, tensors: Mapping[str, TensorEntry], form: CodeFormat) -> AwqMatrix:
    qweight, scales, qzeros = (tensors.get(f"{module}.{name}") for name in ("qweight", "scales", "qzeros"))
    assert qweight is not None
    if scales is None or (qzeros is None and not form.symmetric):
        raise CheckpointError(
            f"{qweight.path}: {module} has qweight and no {'scales' if scales is None else 'qzeros'}.",
            next_step="Download the checkpoint again, or quantize the model again.",
        )
    if f"{module}.weight" in tensors:
        raise CheckpointError(
            f"The checkpoint has {module} twice, as {module}.weight and as {module}{_QWEIGHT}.",
            next_step="Download the checkpoint again, or quantize the model again.",
        )
    if len(qweight.shape) != 2:
        raise _unexpected(qweight, "a matrix of I32")
    columns, rows = qweight.shape[0], qweight.shape[1] * _FIELDS
    span = columns if form.group_size == -1 else form.group_size
    if columns % max(1, span):
        raise _unexpected(qweight, f"a number of rows that groups of {span} divide")
    groups = columns // max(1, span)
    for entry, dtypes, shape in (
        (qweight, ("I32",), qweight.shape),
        (qzeros, ("I32",), (groups, rows // _FIELDS)),
        (scales, ("F16", "BF16", "F32"), (groups, rows)),
    ):
        if entry is not None and (entry.dtype not in dtypes or entry.shape != shape):
            raise _unexpected(entry, f"{' or '.join(dtypes)} {list(shape)}, for groups of {span},")
    return AwqMatrix(module, form, rows, columns, qweight, qzeros, scales)


def _unexpected(entry: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.path}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {expected} is expected.",
        next_step="Use the config.json that belongs to these weights.",
    )
