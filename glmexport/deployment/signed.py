"""A signed bundle, as it is sent to servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.manifest import FileEntry
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Progress
from glmexport.release.release import read_release
from glmexport.release.verification import verify
from glmexport.release.verifier import SIGNATURE
from glmexport.report.document import JSON_NAME, read_report
from glmexport.results.record import Verdict


@dataclass(frozen=True)
class SignedBundle:
    """A bundle whose signature was verified here, and every file of it."""

    directory: Path
    #: SHA-256 of the signature, and so of all that it covers: the release's name on servers.
    name: str
    files: tuple[FileEntry, ...]
    target: str
    counter: int
    #: The verdict of its report, which the signature covers; None: it has none.
    verdict: Verdict | None = None

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(entry.size for entry in self.files)

    @classmethod
    def open(cls, directory: Path, trust: Path, progress: Progress, subject: str | None = None) -> SignedBundle:
        """Verify the bundle in ``directory`` by the key, or the root certificate, in ``trust``.

        With ``subject`` the certificate that signed has to have that name.

        Raises:
            BundleError: it is not signed, or a file is not what was signed.
            MachineError: there is no openssl.
        """
        # Resolved once: the folder may be a link that is switched meanwhile.
        directory = directory.resolve()
        root = "BEGIN CERTIFICATE" in trust.read_text(encoding="utf-8")
        verify(directory, key=None if root else trust, root=trust if root else None, subject=subject)
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        entries = []
        with progress.track("Reading the release", len(paths)) as track:
            for path in paths:
                name = path.relative_to(directory).as_posix()
                entries.append(FileEntry(path=name, size=path.stat().st_size, sha256=sha256(path)))
                track.advance(1, name)
        release = read_release(directory)
        signature = next(entry for entry in entries if entry.path == SIGNATURE)
        report = directory / JSON_NAME
        verdict = read_report(report).verdict if report.is_file() else None
        return cls(directory, signature.sha256[:32], tuple(entries), release.target, release.counter, verdict)

    def require_proof(self) -> None:
        """Check that the bundle was found to be the same model.

        Raises:
            BundleError: its report says otherwise, or nothing.
        """
        if self.verdict not in (Verdict.PASS, Verdict.WARN):
            found = f"its report's verdict is {self.verdict.value}" if self.verdict else "it has no report"
            raise BundleError(
                f"{self.directory} is not proven to be the original's equal: {found}.",
                next_step="Validate it on a device of its target (glmexport validate --device) and sign it again; or "
                "give --unproven.",
            )
