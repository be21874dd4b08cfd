"""Every reader of bytes that strangers wrote, and what it must refuse at once; what each took, measured in a process.

    python tests/hostile/reading.py DIRECTORY

prints a JSON line ``[reader, input, outcome, seconds, bytes]`` for each pair; bytes is how much the resident memory
grew at its highest.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import LOOP_CONFIG, read_loop
from glmexport.bundle.manifest import MANIFEST, read_manifest
from glmexport.bundle.names import GENAI_CONFIG
from glmexport.calibration.corpus import user_documents
from glmexport.checkpoint.adapter_config import AdapterConfig
from glmexport.checkpoint.awq import awq_matrices
from glmexport.checkpoint.compressed import read_compressed
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.gptq import read_settings
from glmexport.checkpoint.header import read_header
from glmexport.checkpoint.index import INDEX, read_index
from glmexport.checkpoint.source import refuse_hazards
from glmexport.demo import demo_checkpoint
from glmexport.deployment.site import open_site
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.fleet import open_fleet
from glmexport.devices.job import JOB, RESULT, read_job
from glmexport.devices.kit import KitResultRunner
from glmexport.foundation.errors import GlmexportError
from glmexport.foundation.target import open_policy, open_target
from glmexport.release import verifier
from glmexport.release.access import RegistryAccess
from glmexport.release.layout import parse_image, read_layout
from glmexport.release.release import read_release
from glmexport.report.document import JSON_NAME, read_report
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.behaviour.tasks import read_tasks
from glmexport.validation.capture import REFERENCE, CapturedReference

CONFIG = "config.json"


@dataclass(frozen=True)
class Reader:
    """What reads the file ``name`` of a folder. ``lists`` and ``tables`` are keys of its document, where it has any."""

    name: str
    read: Callable[[Path], object]
    lists: str = "a"
    tables: str = "b"
    #: What makes the file of a document.
    packed: Callable[[bytes], bytes] = bytes
    #: Whether it is the reader that opens the file.
    is_file: bool = True


def _image(place: Path) -> None:
    content = (place / "image.json").read_bytes()
    parse_image(content, f"sha256:{hashlib.sha256(content).hexdigest()}", "a registry")


def _archived(document: bytes) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(RESULT, document)
    return buffer.getvalue()


def _adapter(place: Path) -> None:
    AdapterConfig.read(ConfigReader.open(place / "adapter_config.json"))


def _quantization(place: Path) -> None:
    settings = read_settings(place, ConfigReader({}, "config.json"))
    if settings is not None:
        settings.format_of("model.layers.0.mlp.experts.0.gate_proj")


def _compressed(place: Path) -> None:
    settings = read_compressed(ConfigReader.open(place / "compressed.json"))
    settings.form_of("model.layers.0.mlp.experts.0.gate_proj")


def _headed(document: bytes) -> bytes:
    return len(document).to_bytes(8, "little") + document


READERS: Mapping[str, Reader] = {
    "manifest": Reader(MANIFEST, read_manifest, "files", "source"),
    "report": Reader(JSON_NAME, lambda place: read_report(place / JSON_NAME), "gates", "versions"),
    "loop": Reader(LOOP_CONFIG, read_loop, "eos_token_id", "caches"),
    "genai_config": Reader(GENAI_CONFIG, GenaiConfig.read, "model", "model"),
    "config": Reader(CONFIG, lambda place: ConfigReader.open(place / CONFIG)),
    "hazards": Reader("generation_config.json", refuse_hazards),
    "quantization": Reader("quantize_config.json", _quantization, "bits", "dynamic"),
    "compressed": Reader("compressed.json", _compressed, "ignore", "config_groups"),
    "awq": Reader(
        "awq.json", lambda place: awq_matrices({}, [ConfigReader.open(place / "awq.json")]), "bits", "group_size"
    ),
    "index": Reader(INDEX, read_index, "weight_map", "weight_map"),
    "safetensors": Reader("model.safetensors", lambda p: read_header(p / "model.safetensors"), "w", "w", _headed),
    "adapter_config": Reader("adapter_config.json", _adapter, "target_modules", "rank_pattern"),
    "tokenizer": Reader("tokenizer.json", Tokenizer.open, "added_tokens", "model"),
    "tokenizer_config": Reader("tokenizer_config.json", Tokenizer.open, "chat_template", "added_tokens_decoder"),
    "special_tokens": Reader("special_tokens_map.json", Tokenizer.open),
    "chat_template": Reader("chat_template.jinja", Tokenizer.open),
    "result": Reader(RESULT, lambda place: DeviceAnswers.open("d", place, place), "nodes", "device"),
    "archive": Reader(
        "results.zip",
        lambda place: KitResultRunner("d", place / "results.zip")(place, place, None),  # type: ignore[arg-type]
        "nodes", "device", _archived,
    ),
    "job": Reader(JOB, read_job, "files", "graphs"),
    "reference": Reader(REFERENCE, CapturedReference.open, "texts", "source"),
    "release": Reader("release.json", read_release),
    "layout": Reader("index.json", read_layout, "manifests", "annotations"),
    "image": Reader("image.json", _image, "layers", "annotations", is_file=False),
    "credentials": Reader(
        "auth.json", lambda place: RegistryAccess.given("h", None, place / "auth.json", plain_http=False), "auths"
    ),
    "signature": Reader(verifier.SIGNATURE, verifier.read_envelope),
    "tasks": Reader("tasks.jsonl", lambda place: read_tasks([place / "tasks.jsonl"]), "choices", "messages"),
    "corpus": Reader("text.jsonl", lambda p: user_documents([p / "text.jsonl"], Tokenizer.open(demo_checkpoint()))),
    "site": Reader("site.toml", lambda place: open_site(place / "site.toml")),
    "fleet": Reader("fleet.toml", lambda place: open_fleet(place / "fleet.toml")),
    "target": Reader("target.toml", lambda place: open_target(str(place / "target.toml"))),
    "policy": Reader("policy.toml", lambda place: open_policy(place / "policy.toml")),
}  # fmt: skip

#: More than any list or object may have.
MANY = 600_000
KEYS = b",".join(b'"%d":0' % number for number in range(19_999))
#: By name: a document for a reader.
HOSTILE: Mapping[str, Callable[[Reader], bytes]] = {
    "too many wrong items": lambda r: b'{"%s":[%s]}' % (r.lists.encode(), b",".join([b"{}"] * MANY)),
    "items up to the limit": lambda r: b'{"%s":[%s]}' % (r.lists.encode(), b",".join([b"{}"] * 200_000)),
    "lists up to the limit": lambda r: b'{"%s":[%s]}' % (r.lists.encode(), b",".join([b"[[]]"] * 50_000)),
    "too many keys": lambda _: b"{%s}" % b",".join([KEYS, b'"a":0', b'"b":0', *[b'"c":0'] * MANY]),
    "keys up to the limit": lambda r: b'{"%s":{%s}}' % (r.tables.encode(), KEYS),
    "deep lists": lambda _: b"[" * 100_000,
    "deep objects": lambda _: b'{"a":' * 100_000,
    "a long text": lambda r: b'{"%s":"%s"}' % (r.lists.encode(), b"a" * (20 * MANY)),
    "a long escaped text": lambda r: b'{"%s":"%s"}' % (r.lists.encode(), b'\\"' * (10 * MANY)),
    "a long number": lambda r: b'{"%s":%s}' % (r.lists.encode(), b"9" * (20 * MANY)),
    "a number of 5,000 digits": lambda r: b'{"%s":%s}' % (r.lists.encode(), b"9" * 5000),
    "an infinite number": lambda r: b'{"%s":Infinity}' % r.lists.encode(),
    "a key twice": lambda r: b'{"%s":1,"\\u00%02x%s":1}' % (r.lists.encode(), ord(r.lists[0]), r.lists[1:].encode()),
    "half a pair": lambda r: b'{"%s":"\\ud800"}' % r.lists.encode(),
    "no UTF-8": lambda _: b'{"\xff":1}',
}  # fmt: skip
PLACES = ("a pipe", "a device", "a folder", "a terabyte")


def _grown(reader: Reader, place: Path) -> tuple[str, float, int]:
    Path("/proc/self/clear_refs").write_text("5")  # The highest resident memory begins anew.
    before, start = _memory("VmRSS"), time.process_time()
    try:
        reader.read(place)
        outcome = "accepted"
    except (GlmexportError, verifier.VerificationError) as error:
        outcome = "refused" if len(str(error)) < 5000 else "refused at length"
    except BaseException as error:  # Whatever it is, the test tells of it.
        outcome = f"{type(error).__name__}: {error}"[:300]
    return outcome, time.process_time() - start, _memory("VmHWM") - before


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def _place(kind: str, path: Path) -> None:
    match kind:
        case "a pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a folder":
            path.mkdir()
        case _:
            with path.open("wb") as file:
                file.truncate(1 << 40)


def main(directory: Path) -> None:
    """Try every pair."""
    address_space = _memory("VmSize") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    valid = demo_checkpoint()
    for number, (name, reader) in enumerate(READERS.items()):
        for title in (*HOSTILE, *(PLACES if reader.is_file else ())):
            place = directory / f"{number}-{title.replace(' ', '_')}"
            place.mkdir(parents=True)
            if reader.read == Tokenizer.open and reader.name != "tokenizer.json":
                (place / "tokenizer.json").write_bytes((valid / "tokenizer.json").read_bytes())
            path = place / reader.name
            if title in HOSTILE:
                path.write_bytes(reader.packed(HOSTILE[title](reader)))
            else:
                _place(title, path)
            print(json.dumps([name, title, *_grown(reader, place)]), flush=True)
            if path.is_file():
                path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
