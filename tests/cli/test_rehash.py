"""The digest of a checkpoint is taken once, by whichever command comes first, and anew where that is asked for."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builds import Run, Sample

from glmexport.bundle.bundle import Bundle
from glmexport.cli.build import build
from glmexport.cli.convert import convert
from glmexport.cli.reference import reference
from glmexport.cli.tune import tune
from glmexport.cli.validate import validate
from glmexport.foundation import digests
from glmexport.foundation.errors import EXIT_INPUT, EXIT_MACHINE
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import open_target
from glmexport.release.opening import NOBODY, Trust
from glmexport.workflows import matching
from glmexport.workflows.checks import require_space
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import jobs_of
from glmexport.workflows.matching import check_original
from glmexport.workflows.original import Original

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read for a digest, with an empty cache, for which all are large and old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("glmexport.foundation.digests._KEPT_BYTES", 1)
    now, plain = time.time_ns, vars(digests)["_read"]
    monkeypatch.setattr("glmexport.foundation.digests.time.time_ns", lambda: now() + 10**10)
    names: list[str] = []

    def watched(path: Path, *arguments: Any) -> Any:
        names.append(path.name)
        return plain(path, *arguments)

    monkeypatch.setattr("glmexport.foundation.digests._read", watched)
    return names


def test_a_second_command_does_not_read_the_weights(sample: Sample, run: Run, read: list[str], tmp_path: Path) -> None:
    def converted(*options: str) -> str:
        read.clear()
        place = tmp_path / "gptq", "--to", "gptq", "--force"
        outcome = run("convert", sample.bundle, "--against", sample.checkpoint, "-o", *place, *options)
        assert outcome.code == 0, outcome.stderr
        return outcome.stderr

    assert "did not change since" not in converted()
    assert read.count(WEIGHTS) == 1
    assert "files did not change since they were last read" in converted()
    assert read == []
    assert "did not change since" not in converted("--rehash")
    assert read.count(WEIGHTS) == 1
    # A command of another kind, which finds what the one before kept.
    read.clear()
    outcome = run("reference", sample.checkpoint, "-o", tmp_path / "reference")
    assert outcome.code == 0, outcome.stderr
    assert read == []


@pytest.mark.parametrize("trust", [NOBODY, Trust(key=Path("key.pem"))], ids=["nobody", "a key"])
def test_where_a_signature_is_asked_for_every_byte_is_read(
    sample: Sample, read: list[str], monkeypatch: pytest.MonkeyPatch, trust: Trust
) -> None:
    Original.open(str(sample.checkpoint), Silent()).checkpoint.digest()
    read.clear()
    # The signature of the bundle itself is no matter here.
    monkeypatch.setattr(matching, "check_bundle", lambda *_, **__: None)
    check_original(Bundle.open(sample.bundle), Original.open(str(sample.checkpoint), Silent()), Silent(), trust)
    assert read.count(WEIGHTS) == trust.given


@pytest.mark.parametrize(
    "options",
    [
        ("--max-memory", "1MiB"),
        ("--evaluation", "nowhere.txt"),
        ("--tasks", "nowhere.jsonl"),
        ("--calibration", "nowhere.txt"),
        ("--recipe", "nowhere"),
        ("--output", "exists"),
        ("--target", "nowhere"),
        ("full",),
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_what_can_be_refused_is_refused_before_a_byte_is_read(
    sample: Sample,
    run: Run,
    read: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").mkdir()
    if options == ("full",):
        monkeypatch.setattr("glmexport.foundation.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 10))
        options = ()
    if options[:1] != ("--recipe",):
        options = "--recipe", str(sample.recipe), *options
    assert run("build", sample.checkpoint, *options).code in (EXIT_INPUT, EXIT_MACHINE)
    assert read == []


def test_the_disk_has_to_hold_every_bundle_of_a_build(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("glmexport.workflows.checks.require_free", lambda _, size, what: needed.append(size))
    original = Original.open(str(sample.checkpoint), Silent())
    one, two = (
        jobs_of(original, [open_target(name) for name in names], str(sample.recipe), None)
        for names in (["x86-avx2"], ["x86-avx2", "arm64"])
    )
    require_space(original, [one], 0)
    require_space(original, [two], 0)
    require_space(original, [two], 1 << 20)
    second = estimate(original.planned(two[1].recipe, two[1].target), None).bundle_bytes
    assert needed[1] - needed[0] >= second > 100_000
    assert needed[2] >= (1 << 20) * 3 * original.architecture.hidden_size * 4


@pytest.mark.parametrize("command", [build, convert, reference, tune, validate])
def test_every_command_that_takes_a_digest_can_be_told_to_read(command: Any) -> None:
    assert "--rehash" in [option for parameter in command.params for option in parameter.opts]
