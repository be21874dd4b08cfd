"""Releases to and from a registry: only what is missing is sent, and nothing is used that is not what it claims."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glmexport.foundation.errors import InputError, UnverifiedError
from glmexport.foundation.progress import Progress
from glmexport.release.access import ImageReference, RegistryAccess
from glmexport.release.incoming import Check, arriving, refuse_existing, require_room
from glmexport.release.layout import Descriptor, ImageManifest, open_blob, parse_image, read_layout
from glmexport.release.registry import Registry
from glmexport.release.verifier import sha256


@dataclass(frozen=True)
class PushResult:
    """An image in its registry: its digest, the files that were sent, those that were there, and the bytes sent."""

    digest: str
    sent: tuple[str, ...]
    present: tuple[str, ...]
    sent_bytes: int


def push(layout: Path, reference: ImageReference, access: RegistryAccess, progress: Progress) -> PushResult:
    """Send the image in a layout to a registry, under the tag of ``reference``.

    Raises:
        InputError: there is no layout, the reference has no tag, or the registry lets us not.
        UnverifiedError: a blob of the layout is damaged.
        MachineError: the registry cannot be reached, or fails.
    """
    if reference.tag is None:
        raise InputError(f"{reference} has no tag to push to.", next_step="Write HOST/NAME:TAG.")
    digest, content, image = read_layout(layout)
    if reference.digest not in (None, digest):
        raise InputError(f"{layout} has the image {digest}, not {reference.digest}.", next_step="Give another one.")
    sent: list[str] = []
    present: list[str] = []
    total = 0
    blobs = list(_distinct((image.config, *image.layers)))
    with Registry(reference, access) as registry, progress.track("push", len(blobs)) as track:
        for blob in blobs:
            path, name = open_blob(layout, blob), blob.name or "(configuration)"
            if registry.has(blob.digest):
                present.append(name)
            else:
                registry.upload(path, blob, lambda _: None)
                sent.append(name)
                total += blob.size
            track.advance(detail=name)
        registry.put_manifest(content, digest, reference.tag)
    return PushResult(digest, tuple(sent), tuple(present), total)


def pull(
    reference: ImageReference,
    destination: Path,
    check: Check,
    access: RegistryAccess,
    progress: Progress,
    max_bytes: int | None = None,
) -> str:
    """Get a bundle from a registry to ``destination``, which must not exist; return the image's digest.

    What a pull has got that the registry breaks off stays in ``.DESTINATION.pulling``, and the next one goes on from
    there; of one that is refused nothing stays.

    Raises:
        InputError: ``destination`` exists, the registry has no such image or lets us not, or the image has more than
            ``max_bytes``.
        UnverifiedError: something is not what its digest says, or what ``check`` says.
        MachineError: the registry cannot be reached, or fails, or there is no room for what the image claims.
    """
    refuse_existing(destination)
    with Registry(reference, access) as registry:
        content = registry.manifest()
        digest = reference.digest or f"sha256:{hashlib.sha256(content).hexdigest()}"
        image = parse_image(content, digest, str(reference))
        partial = destination.with_name(f".{destination.name}.pulling")
        _require_fit(image, str(reference), partial, max_bytes)
        with _removed_if_refused(partial), arriving(destination, partial) as folder:
            parts = folder / ".parts"
            _keep_only(folder, image.layers)
            parts.mkdir(exist_ok=True)
            with progress.track("pull", len(image.layers)) as track:
                for blob in image.layers:
                    target = folder / blob.name
                    if not (target.is_file() and sha256(target) == blob.hex):
                        registry.download(blob, parts / blob.hex, lambda _: None)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        (parts / blob.hex).replace(target)
                    track.advance(detail=blob.name)
            shutil.rmtree(parts)
            check(folder)
    return digest


def _require_fit(image: ImageManifest, where: str, partial: Path, most: int | None) -> None:
    """Require that an image claims no more than is wanted, nor than there is room for beside ``partial``."""
    claimed = sum(layer.size for layer in image.layers)
    if most is not None and claimed > most:
        raise InputError(
            f"{where} says that it has {claimed:,} bytes, and {most:,} are allowed.",
            next_step="Give a greater --max-size, if the image may have so many.",
        )
    held = sum(path.lstat().st_size for path in partial.rglob("*") if path.is_file())
    require_room(partial.parent, claimed - min(held, claimed), where)


@contextmanager
def _removed_if_refused(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        begun = any(path.is_file() and path.lstat().st_size for path in partial.rglob("*"))
        if not partial.is_symlink() and (isinstance(error, UnverifiedError) or not begun):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _distinct(blobs: Iterable[Descriptor]) -> Iterable[Descriptor]:
    """Return each blob once: two files of one content are one."""
    return {blob.digest: blob for blob in blobs}.values()


def _keep_only(folder: Path, layers: Iterable[Descriptor]) -> None:
    """Remove what an earlier pull of something else has left."""
    names = {layer.name for layer in layers}
    hashes = {layer.hex for layer in layers}
    for path in list(folder.rglob("*")):
        name = path.relative_to(folder)
        wanted = name.as_posix() in names or (name.parts[0] == ".parts" and name.name in hashes)
        if path.is_symlink() or (path.is_file() and not wanted):
            path.unlink()
