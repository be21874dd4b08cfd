"""Both verifiers say the same of whatever a signed bundle is changed to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import Subject, both_say
from signatures import Authority, Pair

from glmexport.release.keys import KeyFiles, open_signatory

SEED = 20260


def small_bundle(directory: Path) -> dict[str, str]:
    """As few bytes as both verifiers look at; their SHA-256 by name."""
    contents = {"model.onnx": b"model", "weights/block_000.data": b"weights", "tokenizer.json": b"{}"}
    listed = [
        {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    release = {"format": "glmexport-release", "version": 1, "bundle": "sha256:" + "0" * 64, "counter": 7, "target": "x"}
    contents |= {"bundle.json": json.dumps({"files": listed}).encode(), "release.json": json.dumps(release).encode()}
    contents |= {"attestations/provenance.json": b"{}"}
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


@pytest.fixture
def subjects(keys: Pair, authority: Authority, tmp_path: Path) -> list[Subject]:
    """One signed by a key, and one by a certificate."""
    by_certificate = KeyFiles(authority.key, authority.certificate, (authority.intermediate, authority.root))
    found = []
    for name, files in (("by-key", KeyFiles(keys.private)), ("by-certificate", by_certificate)):
        directory = tmp_path / name / "bundle"
        digests = small_bundle(directory)
        (directory / "model.sig").write_bytes(open_signatory(files).model_signature("bundle", digests))
        trusted = {"key": keys.public} if name == "by-key" else {"root": authority.root}
        assert files.private_key
        found.append(Subject(directory, files.private_key, **trusted))
    return found


def agree(count: int, seed: int, subjects: list[Subject]) -> Counter[tuple[str, bool]]:
    """Change ``count`` bundles; how many of each kind of change were taken and refused."""
    told: Counter[tuple[str, bool]] = Counter()
    for number in range(count):
        kind, package, alone = both_say(Random(f"{seed}/{number}"), subjects[number % len(subjects)])
        assert package == alone, f"{kind}, {seed}/{number}: {package} and {alone}"
        told[kind, isinstance(package, dict)] += 1
    return told


def test_some_changes(subjects: list[Subject]) -> None:
    told = agree(400, SEED, subjects)
    # Most are refused; what is signed again and still a bundle is taken.
    assert sum(told[each] for each in told if each[1]) > 10
    assert sum(told[each] for each in told if not each[1]) > 200


@pytest.mark.release
def test_twenty_thousand_changes(subjects: list[Subject]) -> None:
    assert agree(20_000, SEED + 1, subjects).total() == 20_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 1))
def test_any_change(subjects: list[Subject], chance: Random, which: int) -> None:
    kind, package, alone = both_say(chance, subjects[which])
    assert package == alone, kind
