"""The manifest bundle.json: what a bundle is, where it comes from, and the size and SHA-256 of each of its files."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from glmexport.bundle.records import AllocatedGroup, ExpertCoverage, QuantizedMatrix, StoredTensor
from glmexport.foundation.definition import Definition, read_json
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import cache_repository, is_inside, sha256
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.target import Target
from glmexport.foundation.untrusted import DocumentLimits

MANIFEST = "bundle.json"
#: Files that validation writes into a bundle.
REPORTS = frozenset({"report.json", "report.html", "report.md", "report.xml"})
#: Files that signing writes into a bundle, beside the folder of attestations.
SIGNATURE = "model.sig"
RELEASE_FILES = frozenset({"release.json", "golden.json", "verify.py", SIGNATURE})
ATTESTATIONS = "attestations"
#: Names of files that a build writes. A bundle has no others: no library, no program, no graph of another name.
_FILES = re.compile(
    r"(model|scoring|step|draft)\.onnx|weights/[A-Za-z0-9_]+(\.[0-9]+)?\.data|folds\.safetensors"
    r"|(genai_config|loop|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer\.model|(vocab|merges)\.txt|chat_template\.jinja|additional_chat_templates/[^/\\\x00-\x1f]+\.jinja"
)
#: The operator whose content a provider runs unchecked, compiled by the maker of the graph.
_PRECOMPILED = b"EPContext"
#: Limits of the manifest, which has 3.4 million values for a model of 60,000 matrices.
_LIMITS = DocumentLimits(size=128 << 20, values=4_000_000)
#: Files of evidence about a bundle, written after it and therefore not covered by its digest.
EVIDENCE = REPORTS | RELEASE_FILES


class FileEntry(Definition):
    """One file, its path relative to the bundle."""

    path: str
    size: int
    sha256: str


class AdapterSource(Definition):
    """The LoRA adapter that was merged into the checkpoint."""

    name: str
    digest: str


class Source(Definition):
    """The checkpoint that a bundle was made from."""

    name: str
    #: The digest of the checkpoint and, where there is one, of the adapter.
    digest: str
    model_type: str
    parameters: int
    bytes: int
    #: Tensors that are not part of the model, and why.
    unused: dict[str, str]
    adapter: AdapterSource | None = None

    @property
    def title(self) -> str:
        """The name of the checkpoint, and the adapter's."""
        return self.name if self.adapter is None else f"{self.name} with the adapter {self.adapter.name}"


class CalibrationSource(Definition):
    """The text that the Hessians were measured on."""

    digest: str
    tokens: int
    sequences: int
    tokens_per_language: dict[str, int]
    documents: int
    shared_documents: int
    shared_lines: int
    evaluation_documents: int
    #: Fingerprints of the user's own documents among them, which are never evaluation text.
    own: tuple[str, ...] = ()


class CacheQuantization(Definition):
    """The format of cached keys and values, and the size of the text that their scales were calibrated on."""

    format: Literal["int8", "int4"]
    #: The part that has a scale of its own: every channel of a head, or a layer's whole cache.
    scales: Literal["channel", "tensor"]
    sequences: int
    tokens: int


class Precision(Definition):
    """Bits per weight, scales and zero points in the types they are stored in."""

    bits_per_weight: float
    bits_per_weight_linears: float
    weight_bytes: int
    #: Number of bytes that one decoded token reads: every weight but the embedding's other rows and the experts not
    #: chosen.
    bytes_per_decoded_token: int


class DraftGraph(Definition):
    """The graph that drafts tokens for speculative decoding; no answer depends on it."""

    file: str
    #: Bytes of its matrices, scales and zero points included, that the model itself does not have.
    weight_bytes: int
    matrices: tuple[QuantizedMatrix, ...]
    #: The stored tensors of this graph, as in the manifest itself.
    tensors: tuple[StoredTensor, ...] | None = Field(default=None, exclude_if=lambda value: value is None)


class LargestActivation(Definition):
    """The largest number that calibration text caused, for a bundle whose type has a small range."""

    magnitude: float
    #: The key of the module that read it.
    at: str


class Manifest(Definition):
    """The content of bundle.json."""

    format: Literal["glmexport-bundle"] = "glmexport-bundle"
    version: Literal[1] = 1
    glmexport: str
    family: str
    context_length: int
    source: Source
    recipe: Recipe
    target: Target
    calibration: CalibrationSource | None
    precision: Precision
    #: The format of a quantized cache; None where it is not quantized.
    cache: CacheQuantization | None = None
    matrices: tuple[QuantizedMatrix, ...]
    #: The places of every quantized matrix in the graphs; a table that is stored twice is in two. Older manifests lack
    #: the key; they do not have it empty.
    tensors: tuple[StoredTensor, ...] | None = Field(default=None, exclude_if=lambda value: value is None)
    #: The groups of a recipe with a budget.
    allocation: tuple[AllocatedGroup, ...] = ()
    #: The coverage of the experts of a mixture that was calibrated.
    experts: tuple[ExpertCoverage, ...] = ()
    #: The graph of the layer that predicts tokens further ahead, if there is one and a loop of ours decodes.
    draft: DraftGraph | None = None
    #: The largest number on a target that computes in float16, if text was run. Otherwise the key is left out, as in
    #: older bundles.
    largest_activation: LargestActivation | None = Field(default=None, exclude_if=lambda value: value is None)
    #: The route by which quantization computed products of fp32 matrices: fp32 is torch's default, onednn oneDNN;
    #: +bf16 where calibration text passed the blocks in bf16. Manifests of older bundles lack the key.
    arithmetic: str | None = Field(default=None, exclude_if=lambda value: value is None)
    files: tuple[FileEntry, ...]

    @property
    def own_text(self) -> tuple[str, ...]:
        """The fingerprints of the user's own documents that the bundle was calibrated on: no evaluation text."""
        return self.calibration.own if self.calibration else ()

    def digest(self) -> str:
        """Return the SHA-256 over the manifest's values, and so over every file it lists."""
        import hashlib

        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def is_evidence(path: str) -> bool:
    """Return whether a file at ``path`` in a bundle is evidence about it: at its top, or an attestation."""
    folder, _, name = path.partition("/")
    return path in EVIDENCE or (folder == ATTESTATIONS and "/" not in name and name.endswith(".json"))


def list_files(directory: Path) -> tuple[FileEntry, ...]:
    """Return entries of every file under ``directory`` but the manifest and the evidence, by path."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return tuple(
        FileEntry(path=name, size=path.stat().st_size, sha256=sha256(path))
        for name, path in files.items()
        if name != MANIFEST and not is_evidence(name)
    )


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of the bundle in ``directory``.

    Raises:
        BundleError: there is no bundle, or its manifest has another version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST}.",
            next_step="Give a directory that glmexport build wrote.",
        )
    try:
        manifest = read_json(Manifest, path, _LIMITS)
    except ValueError as error:
        raise BundleError(
            f"{path} does not describe a bundle of a version that this glmexport knows: {error}.",
            next_step="Use the glmexport that wrote it, or build it again.",
        ) from error
    for entry in manifest.files:
        if not _FILES.fullmatch(entry.path):
            raise BundleError(
                f"{path} lists {entry.path!r}, and no build writes a file of that name.",
                next_step="Do not use this bundle unless you know who made it; build it again.",
            )
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check that the bundle's files are those that its manifest lists, byte for byte, and no others.

    A bundle has links only in a snapshot of the hub's cache, where they lead to the files of that cache.

    Raises:
        BundleError: names the first file that is missing, changed, linked to elsewhere or additional.
    """
    listed = {entry.path: entry for entry in manifest.files}
    cached = cache_repository(directory.resolve()) is not None
    files = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    present = {path.relative_to(directory).as_posix() for path in files}
    beside = {name for name in present if name == MANIFEST or is_evidence(name)}
    additional = sorted(present - set(listed) - beside)
    if additional:
        raise BundleError(
            f"{directory} has a file that its manifest does not list: {additional[0]}.",
            next_step="Remove it.",
        )
    for name, entry in listed.items():
        path = directory / name
        again = "Copy the bundle again, or build it again."
        if not path.is_file() or (path.is_symlink() and not cached) or not is_inside(path, directory):
            raise BundleError(f"{path} is missing, or is a link.", next_step=again)
        if path.stat().st_size != entry.size or sha256(path) != entry.sha256:
            raise BundleError(f"{path} is not the file that the manifest lists (its sha256 differs).", next_step=again)
        if path.suffix == ".onnx" and _contains(path, _PRECOMPILED):
            raise BundleError(
                f"{path} has a node that runs what somebody compiled ({_PRECOMPILED.decode()}).",
                next_step="Do not use this bundle unless you know who made it; build it again.",
            )


def _contains(path: Path, content: bytes) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(content) >= 0
