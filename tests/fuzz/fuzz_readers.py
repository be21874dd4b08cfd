"""Fuzzing of what reads bytes that strangers wrote, guided by coverage.

    python tests/fuzz/fuzz_readers.py TARGET [CORPUS] [-max_total_time=SECONDS] [options of libFuzzer]

Each target takes any bytes, and those that begin with 0xFF as a document with a part that is repeated. What it may
raise is a sentence for the user, within ``SECONDS`` of CPU and ``BYTES`` of memory. Anything else is a finding, whose
input libFuzzer writes to a file. ``make fuzz`` runs every target for a minute.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
with atheris.instrument_imports(include=["glmexport", "json"]):
    from reading import READERS, Reader

    from glmexport.demo import demo_checkpoint
    from glmexport.foundation.errors import GlmexportError
    from glmexport.release import verifier
    from glmexport.serving.failure import Refused
    from glmexport.serving.fields import ChatRequest, TextRequest, read_body
    from glmexport.serving.limits import ServingLimits
    from glmexport.tokenizer.templates import render_template

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))
#: What one input may take: CPU seconds, and bytes by which the highest resident memory grows.
SECONDS, BYTES = 2.0, 64 << 20
#: Of a document that is made of an input, bytes.
_LARGEST = 256 << 10


def document(data: bytes) -> bytes:
    """What an input stands for: itself, or a beginning, a part that is repeated, and an end, with zeros in between."""
    parts = data[2:].split(b"\0", 2)
    if data[:1] != b"\xff" or len(parts) < 3 or not parts[1]:
        return data
    begin, part, end = parts
    return begin + part * min(1 << (data[1] % 18), _LARGEST // len(part)) + end


def of_reader(reader: Reader) -> Callable[[bytes], None]:
    """A reader of a file of a folder."""

    def target(data: bytes) -> None:
        (PLACE / reader.name).write_bytes(reader.packed(data))
        reader.read(PLACE)

    return target


def body(data: bytes) -> None:
    """The body of a request."""
    for model in (ChatRequest, TextRequest):
        try:
            read_body(data, model, ServingLimits())
        except Refused:
            continue


def template(data: bytes) -> None:
    """A chat template, in the process that ends when one takes too much."""
    render_template("t", data.decode("utf-8", "replace"), [{"role": "user", "content": "a"}], {"tools": None})


def measured(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """``target``, which fails where it takes too much."""

    def run(data: bytes) -> None:
        given = document(data)
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            target(given)
        except (GlmexportError, verifier.VerificationError) as error:
            if len(str(error)) > 20_000:
                raise RuntimeError(f"a message of {len(str(error))} characters") from error
        seconds = time.process_time() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before << 10
        if seconds > SECONDS or grown > BYTES:
            raise RuntimeError(f"{len(given)} bytes took {seconds:.1f} s and {grown >> 20} MiB")

    return run


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{name: of_reader(reader) for name, reader in READERS.items()},
    "template": template,
    "body": body,
}


def prepare(name: str) -> None:
    """What the reader needs beside its file."""
    if name in ("tokenizer_config", "special_tokens", "chat_template"):
        (PLACE / "tokenizer.json").write_bytes((demo_checkpoint() / "tokenizer.json").read_bytes())
    for argument in sys.argv[1:]:
        corpus = Path(argument)
        if name in READERS and corpus.is_dir():
            reader = READERS[name]
            keys = reader.lists.encode(), reader.tables.encode()
            (corpus / "begin").write_bytes(b'{"%s":[{"a":1}],"%s":{"a":"b"}}' % keys)
            (corpus / "repeated").write_bytes(b'\xff\x10{"%s":[\0{"a":1},\0{}]}' % keys[:1])
            (corpus / "nested").write_bytes(b'\xff\x10\0{"%s":\0' % keys[1:])


if __name__ == "__main__":
    name = sys.argv.pop(1)
    prepare(name)
    target = measured(TARGETS[name])
    # Whatever is loaded once is no input's.
    target(b"{}")
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
