"""The deliverable: a directory that onnxruntime-genai loads as it is, with a manifest of every file in it."""

from glmexport.bundle.genai import MODEL
from glmexport.bundle.manifest import (
    EVIDENCE,
    MANIFEST,
    AdapterSource,
    CalibrationSource,
    FileEntry,
    Manifest,
    Precision,
    Source,
    read_manifest,
    verify_files,
)
from glmexport.bundle.write import SCORING, write_bundle

__all__ = [
    "EVIDENCE",
    "MANIFEST",
    "MODEL",
    "SCORING",
    "AdapterSource",
    "CalibrationSource",
    "FileEntry",
    "Manifest",
    "Precision",
    "Source",
    "read_manifest",
    "verify_files",
    "write_bundle",
]
