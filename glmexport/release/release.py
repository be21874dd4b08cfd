"""release.json says what was released for which target, and has a counter by which an older release is recognised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import BundleError, InputError
from glmexport.foundation.untrusted import SMALL
from glmexport.release.verifier import RELEASE

#: The bound of a counter, which JSON and every language of a verifier has to hold.
_COUNTERS = 1 << 63
_SHA256 = r"^sha256:[0-9a-f]{64}$"


class Release(Definition):
    """The content of release.json."""

    format: Literal["glmexport-release"] = "glmexport-release"
    version: Literal[1] = 1
    #: Digest of the bundle's manifest.
    bundle: Annotated[str, Field(pattern=_SHA256)]
    #: Name of the target that the bundle was built for.
    target: str
    #: Greater in every later release, so that a device can refuse to go back.
    counter: Annotated[int, Field(strict=True, ge=0, lt=_COUNTERS)]
    #: Version of glmexport that signed.
    glmexport: str
    #: SHA-256 of golden.json; None where there is none.
    golden: Annotated[str, Field(pattern=_SHA256)] | None = None
    golden_absent_because: str | None = None


def read_release(bundle: Path) -> Release:
    """Return the release.json of a signed bundle; its signature is not verified.

    Raises:
        BundleError: it is missing, or is none.
    """
    path = bundle / RELEASE
    if not path.is_file():
        raise BundleError(f"{bundle} is not signed: it has no {RELEASE}.", next_step="Sign it with glmexport sign.")
    try:
        return read_json(Release, path, SMALL)
    except ValueError as error:
        raise BundleError(
            f"{path} describes no release: {error}.", next_step="Sign the bundle again."
        ) from error


def next_counter(bundle: Path, counter: int | None, *, force: bool) -> int:
    """Return ``counter``, or the time in seconds since 1970: greater than that of the release that is there.

    Raises:
        InputError: it is not, and ``force`` is off.
        BundleError: the release that is there cannot be read, and ``force`` is off.
    """
    wanted = int(time.time()) if counter is None else counter
    if not 0 <= wanted < _COUNTERS:
        raise InputError(f"{wanted} is no counter.", next_step="Give a number from 0 to 2^63 - 1.")
    if force or not (bundle / RELEASE).exists():
        return wanted
    held = read_release(bundle).counter
    if wanted <= held:
        raise InputError(
            f"{bundle} was released with the counter {held}, and {wanted} is not above it: devices would refuse it.",
            next_step="Give a greater one with --counter; or --force, if no device has seen that release.",
        )
    return wanted
