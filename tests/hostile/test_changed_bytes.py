"""Whatever is changed in a bundle's files: what reads them refuses it in a sentence, or it says the same as before."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builds import Run, Sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import LOOP_CONFIG, read_loop
from glmexport.bundle.manifest import MANIFEST, Manifest, read_manifest, verify_files
from glmexport.bundle.names import GENAI_CONFIG
from glmexport.foundation.errors import EXIT_BLOCK, EXIT_INPUT, EXIT_PASS, BundleError, GlmexportError
from glmexport.report.document import JSON_NAME, read_report

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
#: By the file: what reads it.
READERS: dict[str, Callable[[Path], object]] = {
    MANIFEST: read_manifest,
    GENAI_CONFIG: GenaiConfig.read,
    LOOP_CONFIG: read_loop,
    JSON_NAME: lambda bundle: read_report(bundle / JSON_NAME),
}
QUICKLY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def refused_or_read(name: str, content: bytes, place: Path) -> None:
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    try:
        READERS[name](place)
    except GlmexportError as error:
        assert error.exit_code == EXIT_INPUT and error.next_step
        assert "\n" not in error.message, error.message


@pytest.fixture(scope="module")
def contents(sample: Sample) -> dict[str, bytes]:
    found = {name: (sample.bundle / name).read_bytes() for name in READERS if (sample.bundle / name).is_file()}
    loop = {
        "graph": "model.onnx", "provider": {"name": "CPUExecutionProvider", "package": "onnxruntime"},
        "context_length": 8, "eos_token_id": [1], "input_ids": "a", "attention_mask": "b", "logits": "c", "caches": {},
    }  # fmt: skip
    return {LOOP_CONFIG: json.dumps(loop).encode(), **found}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@QUICKLY
def test_bytes(name: str, contents: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(contents[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(("change", "cut", "insert"))):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 64))]
                content = content or bytearray(b" ")
            case _:
                content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
    refused_or_read(name, bytes(content), tmp_path / "bundle")


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@QUICKLY
def test_values(name: str, contents: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    """Other values than are meant, anywhere in the document."""
    document: Any = json.loads(contents[name])
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    refused_or_read(name, json.dumps(document).encode(), tmp_path / "bundle")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"\xff\xfe", b'{"version": 1e999}'], ids=range(6)
)
def test_documents_that_are_none(name: str, content: bytes, tmp_path: Path) -> None:
    refused_or_read(name, content, tmp_path / "bundle")


NUMBERS = {
    GENAI_CONFIG: [
        *(("model", key) for key in ("context_length", "vocab_size", "bos_token_id", "pad_token_id")),
        ("model", "eos_token_id", 0),
        ("model", "decoder", "num_hidden_layers"),
        ("model", "decoder", "head_size"),
    ],
    LOOP_CONFIG: [("context_length",), ("eos_token_id", 0)],
}


@pytest.mark.parametrize("value", [-1, 10**18, True, 2.5, 2.0, "2", None, [2]])
@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, places in NUMBERS.items() for place in places], ids=str
)
def test_ids_and_sizes_that_no_model_has(
    name: str, place: tuple[Any, ...], value: Any, contents: dict[str, bytes], tmp_path: Path
) -> None:
    document: Any = json.loads(contents[name])
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=str(place[-1 if isinstance(place[-1], str) else -2])) as refusal:
        READERS[name](tmp_path)
    assert name in refusal.value.message


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (GENAI_CONFIG, {"eos_token_id": []}),
        (GENAI_CONFIG, {"eos_token_id": [264]}),
        (GENAI_CONFIG, {"pad_token_id": 264}),
        (LOOP_CONFIG, {"eos_token_id": []}),
    ],
)
def test_tokens_that_are_none(name: str, changes: dict[str, Any], contents: dict[str, bytes], tmp_path: Path) -> None:
    document = json.loads(contents[name])
    (document["model"] if name == GENAI_CONFIG else document).update(changes)
    (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"eos_token_id|264") as refusal:
        READERS[name](tmp_path)
    assert name in refusal.value.message


def test_a_manifest_is_read_as_it_was_written(sample: Sample) -> None:
    manifest = read_manifest(sample.bundle)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    verify_files(sample.bundle, manifest)


def test_one_bit_of_any_file(sample: Sample, tmp_path: Path, run: Run) -> None:
    """Nothing runs with it, and the file is named."""
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    chance = random.Random(0)
    for entry in read_manifest(sample.bundle).files:
        path = bundle / entry.path
        whole = path.read_bytes()
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        done = run("run", bundle, "-p", "Hello", "--max-tokens", 1)
        assert done.code == EXIT_INPUT and entry.path in done.stderr, (entry.path, done.stderr)
        path.write_bytes(whole)
    done = run("run", bundle, "-p", "Hello", "--max-tokens", 1)
    assert done.code == EXIT_PASS, done.stderr


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b", "a\0b", "", ".", "con\\..\\x"])
def test_a_manifest_that_names_files_elsewhere(name: str, sample: Sample, tmp_path: Path, run: Run) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"][0]["path"] = name
    (bundle / MANIFEST).write_text(json.dumps(document))
    done = run("run", bundle, "-p", "Hello", "--max-tokens", 1)
    assert done.code == EXIT_INPUT, done.stderr
    done = run("targets", "check", bundle)
    assert done.code in (EXIT_INPUT, EXIT_BLOCK, EXIT_PASS)
