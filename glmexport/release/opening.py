"""Opening of a bundle to use it: its files are those of its manifest and, where it is signed, those that were signed.

Whoever rewrites a bundle can rewrite its manifest with it. A signature says more, even without the key: its statement
has to name the very files that are there. Whose statement it is, only the key or the root certificate can tell.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.genai_config import GenaiConfig, session_options
from glmexport.bundle.loop import LOOP_CONFIG
from glmexport.bundle.manifest import MANIFEST
from glmexport.bundle.names import GENAI_CONFIG
from glmexport.foundation.errors import BundleError, MachineError, UnverifiedError
from glmexport.foundation.progress import Progress
from glmexport.release import verifier
from glmexport.release.verification import refusal
from glmexport.release.verifier import SIGNATURE


@dataclass(frozen=True)
class Trust:
    """The required signature: by the owner of a public key, or by that of a certificate below a root."""

    key: Path | None = None
    root: Path | None = None
    #: The required subject of the signing certificate, with a root.
    subject: str | None = None

    @property
    def given(self) -> bool:
        """Whether a signature is asked for."""
        return (self.key, self.root, self.subject) != (None, None, None)


NOBODY = Trust()


def open_signed(
    directory: Path, trust: Trust, progress: Progress, *, rewritten: Collection[str] = ()
) -> Bundle:
    """Return the bundle in ``directory``, every file of which was compared with its manifest and with its signature.

    ``rewritten``: names of files that may be others than those that were signed, since the caller writes them again.

    Raises:
        BundleError: there is no bundle, or a file is not the one that the manifest lists.
        UnverifiedError: it is not what was signed; or ``trust`` was given and somebody else, or nobody, has signed it.
        InputError: the key or the certificate cannot be used.
        MachineError: there is no openssl, or a file cannot be read.
    """
    bundle = Bundle.open(directory)
    check_bundle(bundle, trust, progress, rewritten=rewritten)
    return bundle


def check_bundle(
    bundle: Bundle, trust: Trust, progress: Progress, *, rewritten: Collection[str] = ()
) -> None:
    """Compare every file of ``bundle`` with its manifest and with a signature that is there, as ``open_signed``."""
    bundle.verify()
    check_settings(bundle)
    check_signature(bundle, trust, progress, rewritten=rewritten.__contains__)


def check_settings(bundle: Bundle) -> None:
    """Compare what a loop's file gives a session with what the manifest says: what is shown and signed is what runs.

    Raises:
        BundleError: they differ, or a loop's file is not one.
    """
    target, loop = bundle.target, bundle.loop
    if isinstance(loop, GenaiConfig):
        name, same = GENAI_CONFIG, loop.session_options == session_options(target)
    else:
        name, same = LOOP_CONFIG, (loop.provider, loop.session) == (target.provider, target.session)
    if not same:
        raise BundleError(
            f"{bundle.path(name)} gives the session other settings than {MANIFEST}.",
            next_step="Do not use this bundle unless you know who changed it; build it again.",
        )


def check_signature(
    bundle: Bundle,
    trust: Trust,
    progress: Progress,
    *,
    rewritten: Callable[[str], bool] = lambda _: False,
) -> None:
    """Compare ``bundle``, whose files are those of its manifest, with its signature.

    A bundle without one is as good as before, unless ``trust`` is given.

    Raises: what ``open_signed`` raises.
    """
    directory = bundle.directory
    if not trust.given and not os.path.lexists(directory / SIGNATURE):
        return
    try:
        envelope = verifier.read_envelope(directory)
        if trust.given:
            verifier.check_signature(envelope, trust.key, trust.root, trust.subject)
        _compare(bundle, verifier.signed_files(envelope.payload), rewritten)
    except verifier.VerificationError as error:
        raise refusal(directory, error) from error
    except OSError as error:
        raise MachineError(
            f"{error.filename or directory} cannot be read: {error.strerror}.",
            next_step="Check permissions and the disk.",
        ) from error
    if not trust.given:
        progress.remark(f"{directory} is what its {SIGNATURE} lists. Who signed it is checked with --key or --root.")


def _compare(bundle: Bundle, signed: dict[str, str], rewritten: Callable[[str], bool]) -> None:
    directory = bundle.directory
    verifier.check_manifest(directory, signed)
    # Files of the manifest have just been hashed, and check_manifest has compared what it states of them.
    known = {*(entry.path for entry in bundle.manifest.files), MANIFEST, SIGNATURE}
    for name in sorted({*signed, *verifier.files_in(directory)} - known):
        if not rewritten(name):
            _check_file(directory, name, signed)
    if not rewritten(verifier.RELEASE):
        verifier.check_release(directory, signed, None)


def _check_file(directory: Path, name: str, signed: dict[str, str]) -> None:
    if name not in signed:
        raise verifier.VerificationError(f"{name} is not signed.")
    if not (directory / name).is_file():
        raise verifier.VerificationError(f"{name} is signed and missing.")
    if verifier.sha256(directory / name) != signed[name]:
        raise verifier.VerificationError(f"{name} is not what was signed: its sha256 differs.")


def check_signed_file(path: Path) -> None:
    """Compare one file of a bundle with the bundle's signature, if it has one.

    Raises:
        UnverifiedError: the file is another one than was signed.
    """
    if not os.path.lexists(path.parent / SIGNATURE):
        return
    try:
        _check_file(path.parent, path.name, verifier.signed_files(verifier.read_envelope(path.parent).payload))
    except verifier.VerificationError as error:
        raise UnverifiedError(
            f"{path.parent}: {error}",
            next_step=f"If you wrote it since, sign the bundle again; or name {path.name} itself, and not the bundle.",
        ) from error
