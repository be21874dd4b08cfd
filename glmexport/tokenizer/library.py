"""Errors of the tokenizers library, told as what they are: a file that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from glmexport.foundation.errors import CheckpointError, GlmexportError

#: The module of what Rust code raises where it gives up. It is no ``Exception``, and no module that can be imported.
_RUST = "pyo3_runtime"


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Turn whatever the library raises into an error that begins with ``what``.

    The library raises bare ``Exception`` for whatever it does not like, and its Rust code panics at some of the rest.

    Raises:
        CheckpointError: the library gives up.
    """
    try:
        yield
    except (GlmexportError, MemoryError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _RUST:
            raise
        raise CheckpointError(f"{what}: {error}.", next_step="Download the file again.") from error
