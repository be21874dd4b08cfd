"""Regular expressions that configurations name modules by: a stranger's, so that what they may cost has a bound."""

from __future__ import annotations

import time

import regex

from glmexport.foundation.errors import CheckpointError

#: Characters of one expression. Those that libraries write have less than a hundred.
_LONGEST = 2000
#: CPU seconds that one match, and all matches of a table together, may take. A usual match takes microseconds.
_ONCE, _ALTOGETHER = 1.0, 30.0


class ModulePatterns:
    """The expressions of one table, matched from the start of a module's name, as re.match does it.

    Args:
        where: Name of the table, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._left = _ALTOGETHER
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def add(self, pattern: str) -> None:
        """Compile ``pattern``, so that it can be matched.

        Raises:
            CheckpointError: it is no regular expression, or longer than any that is meant.
        """
        if len(pattern) > _LONGEST:
            raise CheckpointError(
                f"{self.where}: a regular expression has {len(pattern):,} characters; at most {_LONGEST:,} are read.",
                next_step="Write the names of the modules out, or split it.",
            )
        try:
            self._compiled[pattern] = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self.where}: {pattern[:80]!r} is no regular expression: {error}.", next_step="Correct the file."
            ) from error

    def match(self, pattern: str, module: str) -> bool:
        """Return whether ``pattern``, which was added, matches the name of ``module`` from its start.

        Raises:
            CheckpointError: it takes too long.
        """
        start = time.process_time()
        try:
            found = self._compiled[pattern].match(module, timeout=_ONCE) is not None
        except TimeoutError:
            found, self._left = False, 0.0
        self._left -= time.process_time() - start
        if self._left < 0:
            raise CheckpointError(
                f"{self.where}: {pattern[:80]!r} takes too long to match names such as {module!r}.",
                next_step="Write the expression without repetitions inside of repetitions, or the names themselves.",
            )
        return found
