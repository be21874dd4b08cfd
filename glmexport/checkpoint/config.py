"""Typed reading of a checkpoint's configuration: a key that is absent or of another type is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

from glmexport.foundation.definition import LARGEST
from glmexport.foundation.errors import CheckpointError
from glmexport.foundation.files import read_json

_SHOWN_CHARACTERS = 80


class ConfigReader:
    """One table of a configuration, and where it is, for the messages.

    A key that is read without a default must be present. A default stands in only for an absent key: ``null``
    is a value, which ``optional_integer`` and ``has`` understand and the others refuse. Every method raises
    CheckpointError with the file, the key, what was found and what is accepted.

    Args:
        values: The table.
        where: The file, and inside it the path of the table.
        otherwise: What to do about a value that is refused, if correcting the file is not the way.
    """

    def __init__(
        self, values: Mapping[str, object], where: str, otherwise: str = "use a checkpoint of a supported family"
    ) -> None:
        self._values = MappingProxyType(dict(values))
        self.where = where
        self.otherwise = otherwise

    @classmethod
    def open(cls, path: Path) -> ConfigReader:
        """Read ``path``, a JSON object.

        Raises:
            CheckpointError: absent or not a JSON object.
            MachineError: the machine does not let us read the file.
        """
        return cls(read_json(path), str(path))

    @property
    def values(self) -> Mapping[str, object]:
        """The table as it is in the file, read-only."""
        return self._values

    def has(self, key: str) -> bool:
        """Return whether ``key`` is present with a value other than ``null``."""
        return self._values.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        """Return a whole number from ``minimum`` to ``maximum``; 3.0 and true are none.

        Without a ``maximum`` the size of the number is at most ``LARGEST``: none is without bounds.
        """
        value = self._found(key, default, accepted := _integers_accepted("an integer", minimum, maximum))
        if not _is_integer(value, minimum, maximum):
            if type(value) is int and value > LARGEST:
                accepted = _integers_accepted("an integer", minimum, maximum or LARGEST)
            raise self._refused(key, value, accepted)
        return cast(int, value)

    def optional_integer(self, key: str, minimum: int | None = None, maximum: int | None = None) -> int | None:
        """Return a whole number as ``integer`` reads it, or None where the key is absent or ``null``."""
        return self.integer(key, minimum=minimum, maximum=maximum) if self.has(key) else None

    def integers(
        self,
        key: str,
        default: tuple[int, ...] | None = None,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> tuple[int, ...]:
        """Return whole numbers as ``integer`` reads them: a list, or a single one, which is taken as a list of one."""
        accepted = _integers_accepted("an integer or a list of integers", minimum, maximum)
        value = self._found(key, default, accepted)
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not all(_is_integer(item, minimum, maximum) for item in items):
            raise self._refused(key, value, accepted)
        return tuple(cast(list[int], items))

    def number(self, key: str, default: float | None = None, minimum: float | None = None) -> float:
        """Return a finite number, at least ``minimum`` where one is given."""
        accepted = "a finite number" + ("" if minimum is None else f" of at least {minimum:g}")
        value = self._found(key, default, accepted)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refused(key, value, accepted)
        try:
            number = float(value)
        except OverflowError as error:
            raise self._refused(key, value, accepted) from error
        if not math.isfinite(number) or (minimum is not None and number < minimum):
            raise self._refused(key, value, accepted)
        return number

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._found(key, default, "a text")
        if not isinstance(value, str):
            raise self._refused(key, value, "a text")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false; 0 and 1 are neither."""
        value = self._found(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._refused(key, value, "true or false")
        return value

    def choice(self, key: str, supported: Iterable[str], default: str | None = None) -> str:
        """Return one of the ``supported`` texts."""
        known = tuple(supported)
        accepted = f"one of {', '.join(known)}"
        value = self._found(key, default, accepted)
        if not isinstance(value, str) or value not in known:
            raise self._refused(key, value, accepted)
        return value

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self._found(key, default, "a list of texts")
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._refused(key, value, "a list of texts")
        return tuple(value)

    def section(self, key: str) -> ConfigReader:
        """Return the table under ``key``."""
        value = self._found(key, None, "a table")
        if not isinstance(value, dict):
            raise self._refused(key, value, "a table")
        return ConfigReader(value, f"{self.where}: {key}", self.otherwise)

    def _found(self, key: str, default: object, accepted: str) -> object:
        if key in self._values:
            return self._values[key]
        if default is None:
            raise CheckpointError(
                f"{self.where}: {key} is missing, and {accepted} is needed there.",
                next_step=f"Download the file again, or {self.otherwise}.",
            )
        return default

    def _refused(self, key: str, value: object, accepted: str) -> CheckpointError:
        found = json.dumps(value, ensure_ascii=False, default=str)
        if len(found) > _SHOWN_CHARACTERS:
            found = f"{found[:_SHOWN_CHARACTERS]}..."
        return CheckpointError(
            f"{self.where}: {key} is {found}, and accepted is {accepted}.",
            next_step=f"Correct the file, or {self.otherwise}.",
        )


def _is_integer(value: object, minimum: int | None, maximum: int | None) -> bool:
    if type(value) is not int:
        return False
    least = -LARGEST if minimum is None else minimum
    return least <= value <= (LARGEST if maximum is None else maximum)


def _integers_accepted(what: str, minimum: int | None, maximum: int | None) -> str:
    least = "" if minimum is None else f" of at least {minimum}"
    if maximum is None:
        return f"{what}{least}"
    return f"{what}{least}{' and' if least else ' of'} at most {maximum}"
