#!/usr/bin/env python3
"""Unpack the bundle of this kit with Python and openssl alone, and verify it.

    python3 unpack.py -o DIRECTORY --key PUBLIC.pem | --root CA.pem [--subject NAME] [--newer-than COUNTER]
        [--json]

Take the key from where you trust, not from the medium that this kit came on. The signature is verified first; then only
files that it lists are written, byte for byte as it lists them, and DIRECTORY appears when all of them are there.

Exit codes: 0 unpacked and verified, 64 unusable arguments, 65 not what was signed, 69 openssl or the disk failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

_VOLUME = re.compile(r"bundle\.tar\.[0-9]{3,}")
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)")
#: Limits: bytes of SHA256SUMS, of a header that says more of a file than fits into a plain one, and of an archive's
#: end.
_LONGEST_SUMS, _LONGEST_HEADER = 1 << 22, 1 << 16


def verifier_beside(script: Path) -> Any:
    """Return the module verify.py in the folder of ``script``, whatever else is called so."""
    spec = importlib.util.spec_from_file_location("glmexport_verify", script.with_name("verify.py"))
    if spec is None or spec.loader is None:
        raise ImportError("verify.py is not beside this script")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class ArchiveMember(tarfile.TarInfo):
    """A file of an archive, or a header with its long name: nothing is read of anything else.

    tarfile reads headers of headers, global ones and maps of holes into memory, however long they say that they are.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        more = self.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        if self.size < 0 or not (more or self.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
            raise tarfile.ReadError(f"{self.name!r} is something else than a file")
        if more and self.size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"{self.name!r} has a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise tarfile.ReadError(f"{self.name!r} has holes")


class Volumes(io.RawIOBase):
    """The volumes of a kit as one stream, each checked against its sum in SHA256SUMS."""

    def __init__(self, kit: Path, verifier: Any) -> None:
        super().__init__()
        self._kit, self._refused = kit, verifier.VerificationError
        try:
            with (kit / "SHA256SUMS").open("rb") as file:
                lines = file.read(_LONGEST_SUMS).decode("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise self._refused("SHA256SUMS is missing or damaged.") from error
        found = [_SUM.fullmatch(line) for line in lines]
        if not all(found):
            raise self._refused("SHA256SUMS is damaged.")
        sums = {match[2]: match[1] for match in found if match}
        self._left = sorted((name for name in sums if _VOLUME.fullmatch(name)), key=lambda name: (len(name), name))
        self._sums = sums
        paths = [kit / name for name in self._left]
        #: Bytes of all volumes together.
        self.size = sum(path.lstat().st_size for path in paths if path.is_file())
        self._file: io.BufferedReader | None = None
        self._name, self._hash = "", hashlib.sha256()

    def readable(self) -> bool:
        """Return that volumes can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; raises VerificationError at the end of a volume that is damaged."""
        while self._file or self._left:
            if self._file is None:
                self._name, self._hash = self._left.pop(0), hashlib.sha256()
                path = self._kit / self._name
                if path.is_symlink() or not path.is_file():
                    raise self._refused(f"{self._name} is missing.")
                self._file = path.open("rb")
            count = self._file.readinto(buffer)
            if count:
                self._hash.update(memoryview(buffer)[:count])
                return count
            self._file.close()
            self._file = None
            if self._hash.hexdigest() != self._sums[self._name]:
                raise self._refused(f"{self._name} is damaged: its sha256 is not that in SHA256SUMS.")
        return 0

    def close(self) -> None:
        """Close the volume that is open."""
        if self._file:
            self._file.close()
        super().close()


def extract(stream: Any, signed: dict[str, str], target: Path, verifier: Any) -> None:
    """Write the files of a tar ``stream`` that are in ``signed``: regular ones, each once, byte for byte."""
    missing = dict(signed)
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=ArchiveMember) as archive:
            for member in archive:
                digest = missing.pop(member.name, None)
                if digest is None:
                    raise verifier.VerificationError(
                        f"The archive has {member.name!r}, which is not signed or comes twice."
                    )
                content = None if member.issparse() else archive.extractfile(member)
                if content is None:
                    raise verifier.VerificationError(f"The archive has {member.name!r} as something else than a file.")
                _write(content, target / member.name, digest, member.name, verifier)
        # To the end, so that the last volume is compared with its sum, too; an archive is filled up to a full record.
        if len(stream.read(2 * tarfile.RECORDSIZE)) > tarfile.RECORDSIZE:
            raise verifier.VerificationError("There is more behind the end of the archive.")
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        # What tarfile lets out of headers that were made to confuse it.
        raise verifier.VerificationError(f"The archive is damaged: {type(error).__name__}: {error}.") from error
    for name in sorted(missing):
        raise verifier.VerificationError(f"{name} is signed and not in the archive.")


def _write(content: Any, path: Path, digest: str, name: str, verifier: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in iter(lambda: content.read(1 << 20), b""):
            found.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if found.hexdigest() != digest:
        raise verifier.VerificationError(f"{name} is not what was signed: its sha256 differs.")


def unpack(kit: Path, destination: Path, given: argparse.Namespace, verifier: Any) -> Any:
    """Unpack a kit to ``destination``, which must not exist; return what was verified. Raises VerificationError."""
    if destination.exists() or destination.is_symlink():
        raise verifier.VerificationError(f"{destination} exists.", verifier.EXIT_USAGE)
    envelope = verifier.read_envelope(kit)
    verifier.check_signature(envelope, given.key, given.root, given.subject)
    signed = verifier.signed_files(envelope.payload)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.absolute().parent))
    try:
        bundle = scratch / "bundle"
        bundle.mkdir()
        shutil.copyfile(kit / verifier.SIGNATURE, bundle / verifier.SIGNATURE)
        volumes = Volumes(kit, verifier)
        free = shutil.disk_usage(scratch).free
        if volumes.size > free:
            message = f"The volumes have {volumes.size:,} bytes, and {scratch.parent} has room for {free:,}."
            raise verifier.VerificationError(message, verifier.EXIT_MACHINE)
        # A buffer in between: tarfile reads a stream in pieces, and asks a raw one for more than it may give.
        with io.BufferedReader(volumes, 1 << 20) as stream:
            extract(stream, signed, bundle, verifier)
        found = verifier.verify(bundle, given.key, given.root, given.newer_than, given.subject)
        bundle.rename(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Unpack the kit that this script is in; return the exit code."""
    parser = argparse.ArgumentParser(prog="unpack.py", description="Unpack and verify the bundle of this kit.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY", help="must not exist")
    with_what = parser.add_mutually_exclusive_group(required=True)
    with_what.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="of the key that signed it")
    with_what.add_argument("--root", type=Path, metavar="CA.pem", help="certificate that vouches for who signed it")
    parser.add_argument("--subject", metavar="NAME", help="with --root: whom the certificate has to be of")
    parser.add_argument("--newer-than", type=int, metavar="COUNTER", help="refuse a release that is not above it")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else 0
    script = Path(__file__).absolute()
    try:
        verifier = verifier_beside(script)
    except (ImportError, OSError) as error:
        sys.stderr.write(f"unpack.py: verify.py has to be beside it: {error}\n")
        return 69
    try:
        found = unpack(script.parent, given.output, given, verifier)
    except verifier.VerificationError as error:
        sys.stderr.write(f"unpack.py: {error}\n")
        return int(error.code)
    except OSError as error:
        sys.stderr.write(f"unpack.py: {error.filename or given.output}: {error.strerror}.\n")
        return 69
    sys.stderr.write("" if given.json else f"unpacked and verified: {found.files} files in {given.output}\n")
    sys.stdout.write(json.dumps(found._asdict()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
