"""An OCI image layout of a signed bundle, with the media types of the CNCF's ModelPack, which registries carry.

Every file is a blob of its own, as it is, so that its digest is the file's SHA-256, and what did not change between two
releases is stored and sent once. The same bundle gives the same layout, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from glmexport.bundle.bundle import Bundle
from glmexport.foundation.definition import FailFast, parse_json, read_json
from glmexport.foundation.errors import InputError, UnverifiedError
from glmexport.foundation.files import sha256, write_atomically
from glmexport.foundation.progress import Progress
from glmexport.foundation.untrusted import DocumentLimits
from glmexport.release.access import TAG
from glmexport.release.incoming import (
    Check,
    arriving,
    check_arriving_names,
    copy_verified,
    damaged,
    refuse_existing,
    require_room,
    signed_digests,
)

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
_TAG = "org.opencontainers.image.ref.name"
_KINDS = {"weight": "weight", "settings": "weight.config", "text": "doc", "program": "code"}
_SUFFIXES = {
    ".onnx": "weight", ".data": "weight", ".safetensors": "weight", ".json": "settings", ".jinja": "settings",
    ".txt": "settings", ".model": "settings", ".py": "program", ".html": "text", ".md": "text", ".xml": "text",
    ".sig": "text",
}  # fmt: skip
_DIGEST = r"^sha256:[0-9a-f]{64}$"
#: Bytes of a manifest or an index; registries take no more than 4 MiB.
_LONGEST = 4 << 20
_LIMITS = DocumentLimits(size=_LONGEST, depth=16, values=200_000, text=1 << 16)


class _Part(FailFast):
    """A part of a document that others write, too: keys that are not known here are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Descriptor(_Part):
    """The descriptor of one blob."""

    mediaType: str
    digest: Annotated[str, Field(pattern=_DIGEST)]
    size: Annotated[int, Field(strict=True, ge=0)]
    annotations: dict[str, str] = Field(default_factory=dict)

    @property
    def hex(self) -> str:
        """The digest alone."""
        return self.digest.partition(":")[2]

    @property
    def name(self) -> str:
        """The name of the file that the blob holds."""
        return self.annotations.get(FILE_PATH, "")


class ImageManifest(_Part):
    """The manifest of an image that is a model."""

    schemaVersion: Literal[2]
    artifactType: Literal["application/vnd.cncf.model.manifest.v1+json"]
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Index(_Part):
    schemaVersion: Literal[2]
    manifests: Annotated[tuple[Descriptor, ...], Field(min_length=1, max_length=1)]


def write_layout(bundle: Bundle, directory: Path, progress: Progress, tag: str = "latest") -> str:
    """Write a signed bundle as an image layout into ``directory``, which must not exist; return the image's digest.

    Raises:
        BundleError: the bundle is not signed.
        UnverifiedError: a file is not what its signature states.
        InputError: ``directory`` exists, or ``tag`` is none.
    """
    if not TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is no tag.", next_step="Give letters, digits, '.', '_' and '-', 128 at the most.")
    source = bundle.directory.resolve()
    signed = signed_digests(source)
    require_room(directory.parent, sum((source / name).stat().st_size for name in signed), str(source))
    with arriving(directory) as partial:
        layers = []
        with progress.track("blobs", len(signed)) as track:
            for name, digest in signed.items():
                blob = _blob(partial, digest)
                size = (source / name).stat().st_size
                if not blob.exists():
                    with (source / name).open("rb") as file:
                        size = copy_verified(file, blob, digest, name, str(source))
                elif sha256(source / name) != digest:
                    raise damaged(name, str(source))
                layers.append(_descriptor(_media_type(name), digest, size, {FILE_PATH: name}))
                track.advance(detail=name)
        config = _put(partial, CONFIG_TYPE, _config(bundle, layers))
        image = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": config,
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": _line(bundle.manifest.source.title),
                "org.opencontainers.image.version": bundle.digest,
            },
        }
        described = _put(partial, MANIFEST_TYPE, image)
        listed = described | {"artifactType": ARTIFACT_TYPE, "annotations": {_TAG: tag}}
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [listed]}
        write_atomically(partial / "index.json", _json(index))
        write_atomically(partial / "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    return str(described["digest"])


def read_layout(directory: Path) -> tuple[str, bytes, ImageManifest]:
    """Return digest, content and meaning of the manifest of the one image in a layout.

    Raises:
        InputError: there is no layout of one model.
        UnverifiedError: a part of it is damaged.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise InputError(f"{directory} is no image layout.", next_step="Give a directory that package --oci wrote.")
    try:
        (described,) = read_json(_Index, path, _LIMITS).manifests
    except ValueError as error:
        raise InputError(
            f"{path} is not the index of one image: {error}.", next_step="Package the bundle again."
        ) from error
    content = _small_blob(directory, described)
    return described.digest, content, parse_image(content, described.digest, str(directory))


def parse_image(content: bytes, digest: str, where: str) -> ImageManifest:
    """Return the manifest of an image whose digest is known.

    Raises:
        UnverifiedError: it has another digest, is none of a model, or names files that a bundle cannot have.
    """
    if len(content) > _LONGEST or f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise damaged("The manifest", where)
    try:
        image = parse_json(ImageManifest, content, _LIMITS)
    except ValueError as error:
        raise UnverifiedError(
            f"The image in {where} is no model of a known kind: {error}.", next_step="Package the bundle again."
        ) from error
    check_arriving_names([layer.name for layer in image.layers], f"The image in {where}")
    return image


def unpack_layout(directory: Path, destination: Path, check: Check, progress: Progress) -> None:
    """Write the bundle that a layout holds to ``destination``, which must not exist, once ``check`` has verified it.

    Raises:
        InputError: there is no layout, or ``destination`` exists.
        UnverifiedError: a blob is damaged, or what ``check`` says.
    """
    refuse_existing(destination)
    _, _, image = read_layout(directory)
    require_room(destination.parent, sum(layer.size for layer in image.layers), f"The image in {directory}")
    with arriving(destination) as partial:
        with progress.track("files", len(image.layers)) as track:
            for layer in image.layers:
                with open_blob(directory, layer).open("rb") as file:
                    copy_verified(file, partial / layer.name, layer.hex, layer.name, str(directory))
                track.advance(detail=layer.name)
        check(partial)


def open_blob(directory: Path, blob: Descriptor) -> Path:
    """Open the file of a blob of a layout.

    Raises:
        UnverifiedError: it is missing, linked, or of another size.
    """
    path = _blob(directory, blob.hex)
    if path.is_symlink() or not path.is_file() or path.stat().st_size != blob.size:
        raise damaged(blob.name or f"The blob {blob.digest}", str(directory))
    return path


def _small_blob(directory: Path, blob: Descriptor) -> bytes:
    if blob.size > _LONGEST:
        raise damaged(f"The blob {blob.digest}", str(directory))
    return open_blob(directory, blob).read_bytes()


def _blob(directory: Path, hex_digest: str) -> Path:
    return directory / "blobs" / "sha256" / hex_digest


def _put(directory: Path, media_type: str, document: dict[str, Any]) -> dict[str, Any]:
    content = _json(document)
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(_blob(directory, digest), content)
    return _descriptor(media_type, digest, len(content))


def _descriptor(
    media_type: str, hex_digest: str, size: int, annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    described: dict[str, Any] = {"mediaType": media_type, "digest": f"sha256:{hex_digest}", "size": size}
    return described | ({"annotations": annotations} if annotations else {})


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _media_type(name: str) -> str:
    folder, _, _ = name.rpartition("/")
    evidence = name in ("report.json", "golden.json", "release.json") or folder == "attestations"
    kind = "text" if evidence else _SUFFIXES.get(Path(name).suffix, "weight")
    return f"application/vnd.cncf.model.{_KINDS[kind]}.v1.raw"


def _config(bundle: Bundle, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ModelPack wants to know of a model; no date, which would be another one each time."""
    manifest = bundle.manifest
    parameters = manifest.source.parameters
    scale, letter = next(
        each for each in ((1e9, "b"), (1e6, "m"), (1e3, "k")) if parameters >= each[0] or each[0] == 1e3
    )
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[manifest.target.graph.activations]
    return {
        "descriptor": {
            "name": _line(bundle.manifest.source.title),
            "family": manifest.family,
            "version": bundle.digest,
            "title": _line(f"{manifest.source.title}, {manifest.recipe.name} for {manifest.target.name}"),
        },
        "config": {
            "architecture": "transformer",
            "format": "onnx",
            "paramSize": f"{parameters / scale:.1f}{letter}",
            "precision": precision,
            "quantization": manifest.recipe.name,
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }


def _line(text: str) -> str:
    """Return a name in one line, without what a terminal would obey."""
    return "".join(each if each.isprintable() else " " for each in text)
