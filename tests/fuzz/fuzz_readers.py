"""Fuzzing of what reads bytes that strangers wrote, guided by coverage.

    python tests/fuzz/fuzz_readers.py TARGET [CORPUS] [-max_total_time=SECONDS] [options of libFuzzer]

Each target takes any bytes. What it may raise is a sentence for the user; anything else is a finding, whose input
libFuzzer writes to a file. ``make fuzz`` runs every target for a minute.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["glmexport", "json", "pydantic"]):
    from glmexport.bundle.genai import GENAI_CONFIG
    from glmexport.bundle.manifest import MANIFEST, read_manifest
    from glmexport.checkpoint.header import read_header
    from glmexport.errors import GlmexportError
    from glmexport.loop import LOOP_CONFIG, read_loop
    from glmexport.release import verifier
    from glmexport.report.document import JSON_NAME, read_report
    from glmexport.serving.failure import Refused
    from glmexport.serving.fields import ChatAsked, TextAsked, read_body
    from glmexport.serving.limits import Limits
    from glmexport.validation.genai_config import GenaiConfig

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))


def from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A reader of the file ``name`` of a folder."""

    def target(data: bytes) -> None:
        (PLACE / name).write_bytes(data)
        try:
            read(PLACE)
        except (GlmexportError, verifier.Refused):
            return

    return target


def body(data: bytes) -> None:
    """The body of a request."""
    for model in (ChatAsked, TextAsked):
        try:
            read_body(data, model, Limits())
        except Refused:
            continue


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": from_file(MANIFEST, read_manifest),
    "genai_config": from_file(GENAI_CONFIG, GenaiConfig.read),
    "loop": from_file(LOOP_CONFIG, read_loop),
    "report": from_file(JSON_NAME, lambda place: read_report(place / JSON_NAME)),
    "safetensors": from_file("model.safetensors", lambda place: read_header(place / "model.safetensors")),
    "signature": from_file(verifier.SIGNATURE, verifier.read_envelope),
    "body": body,
}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
