"""The verifier that signed bundles carry, with the key that this server trusts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from glmexport.release.envelope import VerificationError
from glmexport.release.verifier import verify
from glmexport.wire.server.layout import SUBJECT
from glmexport.wire.standalone import Failure


class VerifiedRelease(NamedTuple):
    """A release, every file of which is the one that was signed."""

    directory: Path
    digest: str
    counter: int


def verify_release(directory: Path, trust: Path) -> VerifiedRelease:
    """Verify a release.

    Raises:
        Failure: it is not what was signed; names the file.
    """
    text = trust.read_text("utf-8")
    root = "BEGIN CERTIFICATE" in text
    first = text.partition("\n")[0]
    subject = first[len(SUBJECT) :] if first.startswith(SUBJECT) else None
    try:
        found = verify(directory, None if root else trust, trust if root else None, None, subject)
    except VerificationError as error:
        raise Failure("signature", str(error), "Send it again, or sign it with the key that is trusted.") from error
    return VerifiedRelease(directory, found.digest, found.counter)
