"""A signed bundle, as it is sent to servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.manifest import FileEntry
from glmexport.progress import Progress
from glmexport.quantization import sha256
from glmexport.release import read_release, verify
from glmexport.release.verifier import SIGNATURE


@dataclass(frozen=True)
class SignedBundle:
    """A bundle whose signature was verified here, and every file of it."""

    directory: Path
    #: Of the signature, and so of all that it covers: the release's name on servers.
    name: str
    files: tuple[FileEntry, ...]
    target: str
    counter: int

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(entry.size for entry in self.files)

    @classmethod
    def open(cls, directory: Path, trust: Path, progress: Progress) -> SignedBundle:
        """Verify the bundle in ``directory`` by the key, or the root certificate, in ``trust``.

        Raises:
            BundleError: it is not signed, or a file is not what was signed.
            MachineError: there is no openssl.
        """
        # Resolved once: the folder may be a link that is switched meanwhile.
        directory = directory.resolve()
        root = "BEGIN CERTIFICATE" in trust.read_text(encoding="utf-8")
        verify(directory, key=None if root else trust, root=trust if root else None)
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        entries = []
        with progress.track("Reading the release", len(paths)) as track:
            for path in paths:
                name = path.relative_to(directory).as_posix()
                entries.append(FileEntry(path=name, size=path.stat().st_size, sha256=sha256(path)))
                track.advance(1, name)
        release = read_release(directory)
        signature = next(entry for entry in entries if entry.path == SIGNATURE)
        return cls(directory, signature.sha256[:32], tuple(entries), release.target, release.counter)
