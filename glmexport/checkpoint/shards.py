"""Safetensors files whose headers were checked, read one tensor or a part of one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glmexport.checkpoint.header import WEIGHT_DTYPES, TensorEntry
from glmexport.checkpoint.reading import reading_errors
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import version

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 2**24
_ALL = slice(0, None)


class Shards:
    """Files as they were when their headers were checked; a file that changed since is refused."""

    def __init__(self, paths: Iterable[Path]) -> None:
        # The headers were checked for these versions; reading a mapped file that shrank kills the process.
        self._versions = {path: version(path) for path in paths}

    def read(
        self,
        entry: TensorEntry,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
        accepted: Sequence[str] = WEIGHT_DTYPES,
    ) -> torch.Tensor:
        """Read a tensor, converted, in memory of its own: nothing of the file stays mapped.

        Args:
            entry: Where it lies, in one of the files.
            dtype: Floating-point type of the result; None is float32.
            rows: Part of the first axis; None is all of it.
            columns: Part of the second axis; None is all of it.
            accepted: What it may be stored as.

        Returns:
            Contiguous, of the stored shape less what ``rows`` and ``columns`` leave out, with every value finite.

        Raises:
            CheckpointError: it is not stored as ``accepted``, a value is not finite or does not fit ``dtype``, or the
                file changed since its header was checked.
            MachineError: the file cannot be read, or there is not enough memory.
        """
        import torch
        from safetensors import safe_open

        if entry.dtype not in accepted:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} is stored as {entry.dtype}; "
                f"accepted are {', '.join(accepted)}.",
                next_step="Use the full-precision checkpoint of this model.",
            )
        self.refuse_changed(entry)
        part = None if rows is None and columns is None else (rows or _ALL, *([] if columns is None else [columns]))
        # Closed after every read: pages of a file that stays mapped count as memory of this process.
        with reading_errors(entry), safe_open(entry.path, framework="pt", device="cpu") as shard:
            stored = shard.get_tensor(entry.name) if part is None else shard.get_slice(entry.name)[part]
            tensor: torch.Tensor = stored.to(dtype or torch.float32, copy=True, memory_format=torch.contiguous_format)
            if not is_finite(tensor):
                raise _not_finite(entry, stored, tensor, [] if part is None else [axis.start for axis in part])
            return tensor

    def refuse_changed(self, *entries: TensorEntry) -> None:
        """Check that the files of ``entries`` are as they were.

        Raises:
            CheckpointError: one of them changed.
            MachineError: the machine does not let us look.
        """
        for path in {entry.path for entry in entries}:
            if version(path) != self._versions[path]:
                raise CheckpointError(
                    f"{path} changed since the checkpoint was opened.",
                    next_step="Wait until the download is complete, then run the command again.",
                )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    # The extremes carry every NaN and infinity with them, without the full-size masks that isfinite makes.
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _not_finite(entry: TensorEntry, stored: torch.Tensor, tensor: torch.Tensor, origin: list[int]) -> CheckpointError:
    """``origin`` is where the part that was read begins, an index for each axis that was cut."""
    count, first = 0, -1
    flat = tensor.flatten()
    for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
        bad = flat[begin : begin + _CHUNK_ELEMENTS].isfinite().logical_not()
        if first < 0 and bool(bad.any()):
            first = begin + int(bad.int().argmax())
        count += int(bad.sum())
    index = []
    for size in reversed(tensor.shape):
        first, position = divmod(first, size)
        index.append(position)
    index.reverse()
    for axis, begin in enumerate(origin):
        index[axis] += begin
    where = f"{entry.path}: tensor {entry.name!r}"
    if is_finite(stored):
        target = str(tensor.dtype).removeprefix("torch.")
        return CheckpointError(
            f"{where} has {count:,} values too large for {target}, the first at {index}.",
            next_step="Read it as float32.",
        )
    return CheckpointError(
        f"{where} has {count:,} values that are not finite, the first at {index}.",
        next_step="Download the shard again; if it is the same, the checkpoint itself is broken.",
    )
