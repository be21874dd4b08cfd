"""Strict reading of TOML definitions (recipes, targets, corpora): shipped by name, or a file of the user's."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glmexport.errors import DefinitionError
from glmexport.resources import shipped


class Definition(BaseModel):
    """Base of every table: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


#: What no size and no token id in a file may exceed: no published model comes near it, and whatever is computed from
#: two such numbers is still exact.
LARGEST = 2**24
#: A size in a file that strangers may have written: no text, no 3.0, no true.
Size = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]

T = TypeVar("T", bound=BaseModel)


def names(folder: str) -> list[str]:
    """Names of the definitions shipped in ``folder`` (for example ``targets`` or ``calibration/recipes``)."""
    return sorted(path.stem for path in shipped_folder(folder).glob("*.toml"))


def shipped_folder(folder: str) -> Path:
    """The shipped directory of ``folder``, whose first part is a top-level resource."""
    top, *rest = folder.split("/")
    return shipped(top).joinpath(*rest)


def locate(kind: str, folder: str, name_or_path: str) -> Path:
    """The file of a shipped definition's name, or the path itself if it names a ``.toml`` file.

    Raises:
        DefinitionError: neither exists; the message suggests the nearest shipped name.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise DefinitionError(
                f"There is no {kind} file {name_or_path}.",
                next_step=f"Give a .toml file or one of: {', '.join(names(folder))}.",
            )
        return path
    path = shipped_folder(folder) / f"{name_or_path}.toml"
    if path.parent != shipped_folder(folder) or not path.is_file():
        known = names(folder)
        nearest = difflib.get_close_matches(name_or_path, known, n=1, cutoff=0.4)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise DefinitionError(
            f"There is no {kind} named {name_or_path!r}.",
            next_step=f"{hint}Known: {', '.join(known)}; or give a .toml file.",
        )
    return path


def read_toml(path: Path, model: type[T], extra: dict[str, Any] | None = None) -> T:
    """Parse ``path`` into ``model``; ``extra`` adds keys that the file does not carry, such as its name.

    Raises:
        DefinitionError: not TOML, an unknown key, or a value of the wrong type; names file and key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path} is not TOML: {error}.", next_step="Correct the file.") from error
    try:
        return model.model_validate({**table, **(extra or {})})
    except ValidationError as error:
        raise DefinitionError(
            f"{path}: {first_fault(error)}.",
            next_step=f"Correct the key{'s' if error.error_count() > 1 else ''} ({error.error_count()} in all).",
        ) from error


def first_fault(error: ValidationError) -> str:
    """The first value that is not what was declared, by its key, and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    return f"{key}: {first['msg']}"
