"""Strict reading of typed documents: TOML definitions (recipes, targets, corpora), shipped or the user's, and JSON."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema

from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.resources import shipped
from glmexport.foundation.untrusted import LARGE, DocumentLimits, parse, read_regular

#: Most bytes of a TOML definition. The shipped ones are kilobytes, and the parser's time grows faster than the file.
TOML_LIMIT_BYTES = 1 << 18

_CONTAINERS = frozenset({"list", "tuple", "set", "frozenset", "dict"})
_NOT_SCHEMAS = frozenset({"default", "metadata", "serialization"})


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        # A field of a model may be called "type", too.
        kind = schema.get("type")
        if isinstance(kind, str) and kind in _CONTAINERS:
            schema["fail_fast"] = True
        for key, part in schema.items():
            if key not in _NOT_SCHEMAS:
                _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class FailFast(BaseModel):
    """Base of models that are read from files of strangers: the first wrong item of a list or table ends its check.

    By default a million wrong items become a million errors of kilobytes each.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Definition(FailFast):
    """Base of every table: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


#: A number of a report, where infinity and what was not measured are strings.
Number = Annotated[
    float,
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}),
]
#: A number of things.
Count = Annotated[int, Field(ge=0)]

#: The bound of every size and token id in a file. No published model comes near it, and whatever is computed from two
#: such numbers is still exact.
LARGEST = 2**24
#: A size in a file that strangers may have written. A text, 3.0 and true are refused.
Size = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]

T = TypeVar("T", bound=BaseModel)
V = TypeVar("V")


def parse_json(kind: type[V] | TypeAdapter[V], data: bytes, limits: DocumentLimits = LARGE) -> V:
    """Return the value of ``kind`` that UTF-8 JSON stands for; ``kind`` consists of models that are ``FailFast``.

    Raises:
        ValueError: it passes a limit, is not JSON, or not of that kind; completes a sentence that ends in a colon.
    """
    # Not pydantic's own parser: it copies a whole object into the error of every key that is missing in it.
    value = parse(data, limits)
    try:
        return (kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)).validate_python(value)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


def read_json(kind: type[V] | TypeAdapter[V], path: Path, limits: DocumentLimits = LARGE) -> V:
    """Read a regular file as ``parse_json`` reads bytes.

    Raises:
        ValueError: it is no regular file, or as ``parse_json``.
        OSError: it cannot be read.
    """
    return parse_json(kind, read_regular(path, limits.size), limits)


def first_problem(error: ValidationError) -> str:
    """Return the key that the first problem is at, and the problem."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or '(top level)'}: {first['msg']}"


def names(folder: str) -> list[str]:
    """Return the names of the definitions in the shipped ``folder``, such as ``targets`` or ``calibration/recipes``."""
    return sorted(path.stem for path in shipped_folder(folder).glob("*.toml"))


def shipped_folder(folder: str) -> Path:
    """Return the shipped directory of ``folder``, whose first part is a top-level resource."""
    top, *rest = folder.split("/")
    return shipped(top).joinpath(*rest)


def locate(kind: str, folder: str, name_or_path: str) -> Path:
    """Return the file of a shipped definition's name, or the path itself if it names a ``.toml`` file.

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


def load_toml(path: Path) -> dict[str, Any]:
    """Return the table that the file ``path`` is.

    Raises:
        DefinitionError: not TOML, or larger than a definition is; names the file.
    """
    try:
        return tomllib.loads(read_regular(path, TOML_LIMIT_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise DefinitionError(f"{path} is not TOML: {reason}.", next_step="Correct the file.") from error


def parse_table(source: object, table: dict[str, Any], model: type[T]) -> T:
    """Return ``table`` as a ``model``; ``source`` names its file in messages.

    Raises:
        DefinitionError: an unknown key, or a value of the wrong type; names file and key.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise DefinitionError(
            f"{source}: {first_problem(error)}.",
            next_step=f"Correct the key{'s' if error.error_count() > 1 else ''} ({error.error_count()} in all).",
        ) from error


def read_toml(path: Path, model: type[T], extra: dict[str, Any] | None = None) -> T:
    """Parse ``path`` into ``model``; ``extra`` adds keys that the file does not carry, such as its name.

    Raises:
        DefinitionError: as ``load_toml`` and ``checked``.
    """
    return parse_table(path, {**load_toml(path), **(extra or {})}, model)
