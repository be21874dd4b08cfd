"""Signing: what is known of a bundle is written into it, and every file in it is signed together."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from glmexport import __version__
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import ATTESTATIONS, MANIFEST, RELEASE_FILES, REPORTS, is_evidence
from glmexport.foundation.errors import BundleError, MachineError, UnverifiedError
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Progress, Silent
from glmexport.release import verifier
from glmexport.release.attestations import (
    PROVENANCE_TYPE,
    TEST_RESULT_TYPE,
    provenance,
    report_of,
    subject,
    test_result,
)
from glmexport.release.bom import BOM_TYPE, bill_of_materials
from glmexport.release.golden import GOLDEN, GoldenText, absent_because, record
from glmexport.release.incoming import flush_directory
from glmexport.release.keys import Signatory
from glmexport.release.opening import NOBODY, check_settings, check_signature
from glmexport.release.release import Release, next_counter
from glmexport.release.script import verifier_script
from glmexport.release.verifier import RELEASE, SIGNATURE

VERIFIER = "verify.py"
PROVENANCE = f"{ATTESTATIONS}/provenance.json"
TEST_RESULT = f"{ATTESTATIONS}/test-result.json"
BOM = f"{ATTESTATIONS}/ml-bom.json"
#: Seconds for which a folder of a signature counts as held; after that, as left over.
_NEW_S = 60
#: Files that a signature replaces in a bundle, the signature itself last.
_REPLACED = (*sorted(RELEASE_FILES - {SIGNATURE}), ATTESTATIONS, SIGNATURE)


@dataclass(frozen=True)
class SignedRelease:
    """A release, and the names of all files that its signature covers."""

    release: Release
    files: tuple[str, ...]


def sign(
    bundle: Bundle,
    signatory: Signatory,
    golden: Sequence[GoldenText] | None,
    *,
    counter: int | None = None,
    force: bool = False,
    threads: int = 1,
    progress: Progress,
) -> SignedRelease:
    """Sign a bundle whose files are those of its manifest; a signing that fails leaves it as it was.

    What the bundle answers to the texts ``golden`` is recorded, if they are given and it runs on this machine. If the
    machine dies while the last files are put in place, the signature does not hold, and signing again mends it.

    Raises:
        BundleError: its files are not those of the manifest, or its report is of another bundle.
        UnverifiedError: it is signed already, and what is there is something else.
        InputError: the counter is not above that of the release that is there, and ``force`` is off.
        MachineError: the key does not sign, or the disk refuses.
    """
    # Resolved once: the folder may be a link that is switched meanwhile.
    bundle = Bundle(bundle.directory.resolve(), bundle.manifest)
    directory, manifest = bundle.directory, bundle.manifest
    counter = next_counter(directory, counter, force=force)
    bundle.verify()
    check_settings(bundle)
    # What is replaced may be others' by now; what stays has to be what was signed before.
    try:
        check_signature(bundle, NOBODY, Silent(), rewritten=is_evidence)
    except UnverifiedError as error:
        raise UnverifiedError(
            error.message, next_step=f"If it is you who changed the bundle, remove {SIGNATURE} and sign it."
        ) from error
    try:
        verifier.files_in(directory)
        verifier.check_names([entry.path for entry in manifest.files], MANIFEST)
    except verifier.VerificationError as error:
        raise BundleError(f"{directory} cannot be signed: {error}", next_step="Build it again.") from error
    with _staging(directory) as staging:
        absent = "It was not asked for (--no-golden)." if golden is None else absent_because(bundle)
        if golden is not None and absent is None:
            answers = record(bundle, golden, threads, progress)
            (staging / GOLDEN).write_text(answers.model_dump_json() + "\n", encoding="utf-8")
        elif golden is not None:
            progress.remark(f"No golden answers are recorded. {absent}")
        release = Release(
            bundle=bundle.digest,
            target=manifest.target.name,
            counter=counter,
            glmexport=__version__,
            golden=None if absent else f"sha256:{sha256(staging / GOLDEN)}",
            golden_absent_because=absent,
        )
        (staging / RELEASE).write_text(release.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (staging / VERIFIER).write_text(verifier_script(), encoding="utf-8")
        _attest(bundle, signatory, staging)
        digests = _digests(bundle, staging)
        (staging / SIGNATURE).write_bytes(signatory.model_signature(bundle.name, digests))
        signatory.require_chain(staging / SIGNATURE)
        _put_in_place(staging, directory)
    return SignedRelease(release, tuple(digests))


def _attest(bundle: Bundle, signatory: Signatory, staging: Path) -> None:
    """Write the attestations, each signed by itself, so that it can be handed on without the bundle."""
    manifest, report = bundle.manifest, report_of(bundle)
    statements = {
        PROVENANCE: (PROVENANCE_TYPE, provenance(manifest, report)),
        BOM: (BOM_TYPE, bill_of_materials(manifest, report)),
    }
    if report:
        statements[TEST_RESULT] = (TEST_RESULT_TYPE, test_result(bundle, report))
    (staging / ATTESTATIONS).mkdir()
    about = subject(bundle)
    for name, (kind, predicate) in statements.items():
        (staging / name).write_bytes(signatory.envelope(kind, predicate, about))


def _digests(bundle: Bundle, staging: Path) -> dict[str, str]:
    """Return the SHA-256 by name of every file that will be in the bundle, whose own have just been verified."""
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    for name in (MANIFEST, *REPORTS):
        if bundle.path(name).is_file():
            digests[name] = sha256(bundle.path(name))
    for name in verifier.files_in(staging):
        digests[name] = sha256(staging / name)
    return dict(sorted(digests.items()))


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Yield a folder beside the bundle in ``directory``, of which nothing remains; what killed ones left goes, too."""
    prefix = f".{directory.name}.signing-"
    _remove_left(directory.parent, prefix)
    try:
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    except OSError as error:
        raise MachineError(
            f"{directory.parent} does not let us write beside the bundle: {error.strerror}.",
            next_step="Sign the bundle where its folder can be written to.",
        ) from error
    try:
        with FileLock(place / "lock"):
            staging = place / "files"
            staging.mkdir()
            yield staging
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove_left(folder: Path, prefix: str) -> None:
    """Remove what nobody holds any more; who has just made one may not hold it yet."""
    for left in folder.iterdir():
        named = left.name.startswith(prefix) and left.is_dir() and not left.is_symlink()
        if named and time.time() - left.stat().st_mtime > _NEW_S:
            with contextlib.suppress(Timeout, OSError), FileLock(left / "lock", timeout=0):
                shutil.rmtree(left, ignore_errors=True)


def _put_in_place(staging: Path, directory: Path) -> None:
    """Exchange what a signature replaces in the bundle's ``directory``; what was there comes back if anything fails."""
    for name in verifier.files_in(staging):
        path = staging / name
        path.chmod(0o644)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    before = staging / ".before"
    before.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in _REPLACED:
            for here, there in ((directory / name, before / name), (staging / name, directory / name)):
                if here.exists():
                    here.rename(there)
                    moved.append((here, there))
        flush_directory(directory / ATTESTATIONS)
        flush_directory(directory)
    except BaseException:
        for here, there in reversed(moved):
            there.rename(here)
        raise
