"""The quantized matrices of a checkpoint, whichever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from glmexport.checkpoint.awq import awq_matrices
from glmexport.checkpoint.codes import CodedMatrix, inexact_scale
from glmexport.checkpoint.compressed import activation_tensors, read_compressed
from glmexport.checkpoint.compressed_weights import compressed_matrices
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.derived import DerivedMatrix
from glmexport.checkpoint.gptq import read_settings
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.layouts import AWQ, COMPRESSED, FP8, declared_layout
from glmexport.checkpoint.packed import find_matrices
from glmexport.checkpoint.parts import ScaledMatrix, block_scaled, block_size
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.progress import Progress

_Said = TypeVar("_Said")


@dataclass(frozen=True)
class StoredWeights:
    """The quantized matrices of a checkpoint by the name of their weight, and whose layout it is.

    Attributes:
        layout: ``GPTQ``, ``AWQ``, ``compressed-tensors`` or ``fp8``; None for full precision.
        matrices: What is listed in place of the stored tensors.
        aside: Names of tensors that say nothing about weights.
        inexact: Why no bundle can keep the codes: a scale that it cannot hold. None where it can, or has none.
    """

    layout: str | None = None
    matrices: Mapping[str, DerivedMatrix] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()
    inexact: str | None = None

    @classmethod
    def find(
        cls, directory: Path, config: ConfigReader, tensors: Mapping[str, TensorEntry], progress: Progress | None
    ) -> StoredWeights:
        """Return what ``tensors`` are by what the ``config`` and the files beside it say.

        Raises:
            CheckpointError: they are quantized in a way that is not read here, or do not fit what is said of them.
            MachineError: the machine does not let us read a file.
        """
        layout, tables = declared_layout(directory, config, tensors)
        aside: frozenset[str] = frozenset()
        found: Mapping[str, CodedMatrix | ScaledMatrix]
        if layout == FP8:
            scaled = block_scaled(tensors, _agreed(tables, [block_size(table) for table in tables]))
            return cls(layout, {key: DerivedMatrix(key, (matrix,)) for key, matrix in scaled.items()})
        if layout == COMPRESSED:
            every = [read_compressed(table) for table in tables]
            settings = every[0]
            _agreed(tables, [(each.schemes, each.ignore) for each in every])
            aside = frozenset(activation_tensors(tensors))
            found = compressed_matrices(tensors, settings)
            if settings.aside and progress is not None:
                progress.remark(
                    f"{settings.where}: {' and '.join(settings.aside)} quantize what a server computes, and no weight; "
                    "a bundle leaves that out."
                )
        elif layout == AWQ:
            found = awq_matrices(tensors, tables)
        else:
            found = find_matrices(tensors, read_settings(directory, config), directory)
        inexact = inexact_scale(matrix for matrix in found.values() if isinstance(matrix, CodedMatrix))
        weights = {
            f"{module}.weight": DerivedMatrix(f"{module}.weight", (matrix,), kept=inexact is None)
            for module, matrix in found.items()
        }
        return cls(layout, weights, aside, inexact)


def _agreed(tables: Sequence[ConfigReader], said: Sequence[_Said]) -> _Said:
    """Return what the first of ``tables`` says; the others have to say the same."""
    for table, other in zip(tables, said, strict=True):
        if other != said[0]:
            raise CheckpointError(
                f"{tables[0].where} and {table.where} say different things of how the weights are quantized.",
                next_step="Correct or remove the one that does not belong to these weights.",
            )
    return said[0]
