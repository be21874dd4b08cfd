"""A bundle that arrives is written beside its place, digest by digest, and put there when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from glmexport.foundation.errors import BundleError, InputError, MachineError, UnverifiedError
from glmexport.release import verifier
from glmexport.release.verifier import SIGNATURE

CHUNK = 1 << 20
#: A function that verifies the bundle in a directory, and raises UnverifiedError.
Check = Callable[[Path], object]


def signed_digests(bundle: Path) -> dict[str, str]:
    """Return the SHA-256 by name of every file that a bundle's signature lists; the signature is not verified.

    Raises:
        BundleError: it is not signed.
        UnverifiedError: files are missing, added or linked.
    """
    if not (bundle / SIGNATURE).is_file():
        raise BundleError(f"{bundle} is not signed.", next_step="Sign it with glmexport sign; then package it.")
    try:
        signed = verifier.signed_files(verifier.read_envelope(bundle).payload)
        verifier.check_files(bundle, signed, hashed=False)
    except verifier.VerificationError as error:
        raise UnverifiedError(f"{bundle}: {error}", next_step="Sign it again.") from error
    return dict(sorted({**signed, SIGNATURE: verifier.sha256(bundle / SIGNATURE)}.items()))


def check_arriving_names(names: list[str], where: str) -> None:
    """Raise UnverifiedError unless every name may be that of a file in a bundle, and none comes twice."""
    try:
        verifier.check_names(names, where)
    except verifier.VerificationError as error:
        raise UnverifiedError(str(error), next_step="Do not use it; get it again from where it was made.") from error


def copy_verified(source: BinaryIO, target: Path, digest: str, name: str, where: str) -> int:
    """Copy ``source`` to the new file ``target``, on the disk, and return its size.

    Raises:
        UnverifiedError: its SHA-256 is not ``digest``; names ``name`` and ``where`` it came from.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    found, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK):
            found.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    if found.hexdigest() != digest:
        target.unlink()
        raise damaged(name, where)
    return size


def damaged(name: str, where: str) -> UnverifiedError:
    """Return the error for a file ``name`` that does not have the digest that it should have."""
    return UnverifiedError(
        f"{name} in {where} is damaged: its sha256 is not the one that is stated.",
        next_step="Copy it again from where it was made; if that is no better, do not use it.",
    )


def require_room(directory: Path, needed: int, what: str) -> None:
    """Raise MachineError if ``directory``, or what it will be made in, has no room for ``needed`` bytes of ``what``."""
    there = next(each for each in (directory.absolute(), *directory.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MachineError(
            f"{what} says that it has {needed:,} bytes, and {there} has room for {free:,}.",
            next_step="Free space, or give a place that has it; if it cannot have so many, do not use it.",
        )


def refuse_existing(directory: Path) -> None:
    """Raise InputError if something is there."""
    if directory.exists() or directory.is_symlink():
        raise InputError(f"{directory} exists.", next_step="Remove it, or give another name.")


@contextmanager
def arriving(destination: Path, kept: Path | None = None) -> Iterator[Path]:
    """Provide a folder that becomes ``destination`` at the end; if anything fails, nothing is there.

    ``kept``: a folder for it that stays where it fails, to go on with another time.

    Raises:
        InputError: ``destination`` exists.
    """
    refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = kept or destination.with_name(f".{destination.name}.partial")
    if kept is None:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.is_symlink():
        raise InputError(f"{folder} is a link.", next_step="Remove it.")
    folder.mkdir(exist_ok=kept is not None)
    try:
        yield folder
        refuse_existing(destination)
        for each in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
            flush_directory(each)
        folder.rename(destination)
    except BaseException:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    flush_directory(destination.parent)


def flush_directory(path: Path) -> None:
    """Put the names in a folder on the disk."""
    if os.name == "nt":
        return  # Windows has no handle of a folder to flush.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
