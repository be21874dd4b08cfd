"""The errors that people are told of, and the exit code that each kind ends with.

    GlmexportError
    ├── InputError          the user's: a file, a name or a value is not usable            64
    │   ├── CheckpointError     the checkpoint on disk
    │   ├── DefinitionError     a recipe, target or corpora file
    │   └── BundleError         a bundle on disk
    │       └── UnverifiedError     one that is not what was signed                        65
    └── MachineError        the environment's: disk, memory, permissions, network         69

Any other exception is a bug of ours and ends with 70 and a traceback. Verdicts end with 0 (PASS or WARN),
1 (BLOCK) and 2 (INCONCLUSIVE); Ctrl-C with 130. The numbers from 64 are those of BSD's sysexits.h, so that
they can never be mistaken for a verdict.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_PASS = 0
EXIT_BLOCK = 1
EXIT_INCONCLUSIVE = 2
EXIT_INPUT = 64
EXIT_UNVERIFIED = 65
EXIT_MACHINE = 69
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
#: Characters of a message that people read.
_LONGEST = 4000


class GlmexportError(Exception):
    """Base of every error: what happened to which file or tensor, and in ``next_step`` what to do about it."""

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(self, message: str, *, next_step: str) -> None:
        # It may quote a file, whose texts are as long as their author liked.
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}"


class InputError(GlmexportError):
    """The user's input is at fault: a file, a name or a value cannot be used as it is."""

    exit_code = EXIT_INPUT


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged, unsafe, or of a family without a declaration."""


class DefinitionError(InputError):
    """A recipe, target or corpora file is unknown or does not follow its schema."""


class BundleError(InputError):
    """A bundle is incomplete, changed since it was written, or of an unknown version."""


class UnverifiedError(BundleError):
    """A bundle is not the one that was signed, or nobody known has signed it."""

    exit_code = EXIT_UNVERIFIED


class MachineError(GlmexportError):
    """The environment is at fault: no space, no permission, not enough memory, no network."""

    exit_code = EXIT_MACHINE
