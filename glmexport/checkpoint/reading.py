"""Errors of reading tensors out of shards, named by file and tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from glmexport.checkpoint.header import TensorEntry
from glmexport.foundation.errors import CheckpointError, MachineError
from glmexport.foundation.files import unreadable


@contextmanager
def reading_errors(entry: TensorEntry) -> Iterator[None]:
    """Raise what the library, the system and torch raise while ``entry`` is read as errors of ours.

    Raises:
        CheckpointError: the shard's data cannot be used.
        MachineError: the shard cannot be read, or there is not enough memory.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} cannot be read: {error}.",
            next_step="Download the shard again.",
        ) from error
    except OSError as error:
        raise unreadable(entry.path, error) from error
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a failed allocation or mapping on the CPU.
        if isinstance(error, RuntimeError) and not re.search("memory|mmap", str(error)):
            raise
        raise MachineError(
            f"Not enough memory for tensor {entry.name!r} of {entry.path} ({entry.elements:,} elements).",
            next_step="Close other programs or use a machine with more memory.",
        ) from error
