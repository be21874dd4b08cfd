"""An offline kit: a signed bundle in volumes for media, and scripts that unpack it where there is nothing but Python.

The volumes are one tar archive, cut. The same bundle gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.errors import InputError
from glmexport.foundation.progress import Progress
from glmexport.release import unpacker, verifier
from glmexport.release.incoming import arriving, damaged, require_room, signed_digests
from glmexport.release.release import Release, read_release
from glmexport.release.script import verifier_script
from glmexport.release.verifier import SIGNATURE

UNPACKER, VERIFIER, SUMS, README = "unpack.py", "verify.py", "SHA256SUMS", "README.txt"
DEFAULT_VOLUME = 4 << 30
_SMALLEST_VOLUME = 1 << 12
_README = """A signed glmexport bundle for {target}.

digest   {bundle}
counter  {counter}

Unpack and verify it (Python 3.9 or later, openssl 1.1.1 or later, no network):

    python3 unpack.py -o bundle --key PUBLIC.pem

PUBLIC.pem is the public key of who signed; take it from where you trust, not from this medium. With a certificate of an
authority, give --root CA.pem instead. --newer-than COUNTER refuses a release that is not newer than one you have.

The volumes bundle.tar.000, bundle.tar.001 and so on may come on several media; copy them into one folder first.
'sha256sum -c SHA256SUMS' tells whether the copies are whole. The scripts in this kit came with it: whoever can change
the kit can change them. Where that matters, take unpack.py and verify.py from a kit or an installation that you trust.
"""


def write_kit(bundle: Bundle, directory: Path, progress: Progress, volume_bytes: int = DEFAULT_VOLUME) -> list[str]:
    """Write a signed bundle as a kit into ``directory``, which must not exist; return the names of its volumes.

    Raises:
        BundleError: the bundle is not signed.
        UnverifiedError: a file is not what its signature states.
        InputError: ``directory`` exists, or ``volume_bytes`` are too few.
    """
    if volume_bytes < _SMALLEST_VOLUME:
        raise InputError(
            f"A volume of {volume_bytes} bytes is too small.", next_step="Give --volume-size 1MiB or more."
        )
    source = bundle.directory.resolve()
    signed, release = signed_digests(source), read_release(source)
    require_room(directory.parent, sum((source / name).stat().st_size for name in signed), str(source))
    with arriving(directory) as partial:
        with _Cut(partial, volume_bytes) as volumes:
            _archive(source, signed, volumes, progress)
        shutil.copyfile(source / SIGNATURE, partial / SIGNATURE)
        (partial / VERIFIER).write_text(verifier_script(), encoding="utf-8")
        shutil.copyfile(unpacker.__file__, partial / UNPACKER)
        (partial / README).write_text(_readme(release), encoding="utf-8")
        sums = dict(volumes.sums)
        for name in (README, SIGNATURE, UNPACKER, VERIFIER):
            _flush(partial / name)
            sums[name] = verifier.sha256(partial / name)
        (partial / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="ascii")
        _flush(partial / SUMS)
    return list(volumes.sums)


def _archive(directory: Path, signed: dict[str, str], volumes: _Cut, progress: Progress) -> None:
    """Write the signed files as a tar archive, each verified while it is read; the signature is beside it."""
    names = [name for name in signed if name != SIGNATURE]
    with (
        progress.track("files", len(names)) as track,
        tarfile.open(fileobj=volumes, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = (directory / name).stat().st_size
            member.mode = 0o644
            with (directory / name).open("rb") as file:
                hashed = _Hashed(file)
                archive.addfile(member, hashed)
            if hashed.digest.hexdigest() != signed[name]:
                raise damaged(name, str(directory))
            track.advance(detail=name)


class _Hashed(io.RawIOBase):
    """A file, and the digest of what was read of it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read as the file does, and take the bytes into the digest."""
        chunk = self._file.read(size)
        self.digest.update(chunk)
        return chunk


class _Cut(io.RawIOBase):
    """Files of ``volume_bytes`` that together are what is written; the last may be smaller."""

    def __init__(self, directory: Path, volume_bytes: int) -> None:
        super().__init__()
        self._directory = directory
        self._volume_bytes = volume_bytes
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._room = 0
        #: SHA-256 of each file by name.
        self.sums: dict[str, str] = {}

    def writable(self) -> bool:
        """Return True: the files can be written."""
        return True

    def write(self, content: Any) -> int:
        """Write ``content`` to as many volumes as it takes."""
        rest = memoryview(content)
        while rest:
            if not self._room:
                self._finish()
                self._file = (self._directory / f"bundle.tar.{len(self.sums):03d}").open("xb")
                self._digest, self._room = hashlib.sha256(), self._volume_bytes
            assert self._file is not None
            piece = rest[: self._room]
            self._file.write(piece)
            self._digest.update(piece)
            self._room -= len(piece)
            rest = rest[len(piece) :]
        return len(content)

    def close(self) -> None:
        """Finish the last volume, which is on the disk then."""
        self._finish()
        super().close()

    def _finish(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.sums[Path(self._file.name).name] = self._digest.hexdigest()
            self._file = None


def _readme(release: Release) -> str:
    target = "".join(each if each.isprintable() else " " for each in release.target)
    return _README.format(target=target, bundle=release.bundle, counter=release.counter)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
