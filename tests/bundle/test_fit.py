"""The memory that a bundle takes once it is loaded, and commands that refuse what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from builds import TARGET, THREADS, Run, Sample, run, sample

from glmexport.bundle import fit
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import loaded_bytes
from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_MACHINE

__all__ = ["run", "sample"]


def test_groups_of_128_take_less_than_groups_of_32(sample: Sample) -> None:
    """By hand: a group takes 6 bytes more than are stored of its scale and zero point, and all of it a tenth more."""
    recipe = Bundle.open(sample.bundle).manifest.recipe
    assert recipe.linears is not None
    for size in (32, 128):
        grouped = recipe.model_copy(update={"linears": recipe.linears.model_copy(update={"group_size": size})})
        assert loaded_bytes(10_000, 12_800, grouped) == pytest.approx(1.1 * (10_000 + 6 * 12_800 / size))
    assert loaded_bytes(10_000, 12_800, recipe.model_copy(update={"linears": None})) == 11_000


def test_a_build_whose_bundle_does_not_fit_checks_its_weights(
    run: Run, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "free_bytes", lambda: 1024)
    monkeypatch.setattr("glmexport.cli.build.memory_bytes", lambda: 1024)
    options = ["--target", TARGET, "--recipe", "rtn-w4g32", "--threads", THREADS, "-o", tmp_path / "bundle"]
    outcome = run("build", sample.checkpoint, *options)
    said = " ".join(outcome.stderr.split())
    assert outcome.code == EXIT_INCONCLUSIVE
    assert "only a larger one can run it" in said
    assert "not run on the device: It takes about 0.0 GiB of memory once it is loaded" in said
    assert (tmp_path / "bundle" / "bundle.json").is_file() and not (tmp_path / "bundle" / "report.json").exists()


@pytest.mark.parametrize("verb", ["run", "validate"])
def test_a_bundle_that_does_not_fit_is_refused(
    verb: str, run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of being killed by the system when it is nearly loaded."""
    monkeypatch.setattr(fit, "free_bytes", lambda: 1024)
    options = {"run": ["--prompt", "Hello"], "validate": ["--against", sample.checkpoint]}[verb]
    outcome = run(verb, sample.bundle, *options, "--threads", THREADS)
    assert outcome.code == EXIT_MACHINE
    said = " ".join(outcome.stderr.split())
    assert "of memory once it is loaded, and 0.0 GiB are free here" in said and "build it smaller" in said
