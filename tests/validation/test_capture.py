"""The original asked once: its answers judge bundles as the original itself would, and cannot be changed unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builds import QUICK, THREADS, Outcome, Run, Sample, small_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.foundation.errors import EXIT_INPUT, BundleError
from glmexport.foundation.progress import Silent, Track
from glmexport.reference.arithmetic_choice import choose_arithmetic
from glmexport.report.document import Report, read_report
from glmexport.results.fidelity import CaptureBound
from glmexport.results.record import Verdict
from glmexport.validation.capture import REFERENCE, Capture, CapturedReference
from glmexport.validation.gates import capture_gate
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.original import Original


def options() -> CaptureOptions:
    """Those of a small capture, by the route that the command line takes."""
    return CaptureOptions(THREADS, QUICK, top_k=200, arithmetic=choose_arithmetic("auto", THREADS, Silent()))


@pytest.fixture(scope="module")
def captured(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's original, of whose 264 tokens 200 are kept."""
    directory = tmp_path_factory.mktemp("captured") / "ref"
    capture_reference(Original.open(str(sample.checkpoint), Silent()), directory, options(), Silent())
    return directory


@pytest.fixture
def copied(captured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(captured, tmp_path / "ref")


def by_language(report: Report) -> dict[str, tuple[float, float, float]]:
    rows = report.fidelity.languages
    return {row.language: (row.kl_mean_nats, row.ln_perplexity_ratio.value, row.top1_agreement) for row in rows}


def test_it_judges_as_the_original_does(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    outcome = run("validate", bundle, "--against", sample.checkpoint, "--threads", THREADS)
    whole = read_report(bundle / "report.json")
    again = run("validate", bundle, "--reference", captured, "--threads", THREADS)
    assert again.code == outcome.code
    report = read_report(bundle / "report.json")
    assert "lower bounds" in again.stderr and "lower bounds" not in outcome.stderr
    assert any("lower bound" in limit for limit in report.limits)
    assert by_language(report).keys() == by_language(whole).keys()
    for language, (kl, ratio, agreement) in by_language(whole).items():
        bound, same_ratio, same_agreement = by_language(report)[language]
        assert 0.3 * kl < bound <= kl * (1 + 1e-4), language
        assert same_ratio == pytest.approx(ratio, abs=1e-5) and same_agreement == agreement
    assert report.fidelity.noise_floor == whole.fidelity.noise_floor
    assert report.prompts == whole.prompts
    assert report.reference == whole.reference is not None
    assert any(gate.name == "Original against transformers" for gate in report.gates)
    found = report.fidelity.capture
    assert found is not None and found.top_k == 200 and found.audit_positions == 21 * 8
    assert 0.3 * found.kl_mean_nats < found.kl_mean_partition_nats < found.kl_mean_nats
    assert report.performance.original is None and not report.shares


def test_of_all_tokens_nothing_is_hidden(sample: Sample, tmp_path: Path, run: Run) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    size = original.architecture.vocabulary_size
    capture = capture_reference(original, tmp_path / "ref", CaptureOptions(THREADS, QUICK, top_k=size), Silent())
    assert capture.tail_mass == 0
    bundle = shutil.copytree(sample.bundle, tmp_path / "bundle")
    run("validate", bundle, "--reference", tmp_path / "ref", "--threads", THREADS)
    found = read_report(bundle / "report.json").fidelity.capture
    assert found is not None
    assert found.kl_mean_partition_nats == pytest.approx(found.kl_mean_nats, rel=1e-5)


class Interrupted(Silent):
    """Ctrl-C while the second block is at work."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        with super().track(label, total) as track:
            yield _Interrupts(track) if label.startswith("Original, block") else track


class _Interrupts:
    def __init__(self, track: Track) -> None:
        self.track = track
        self.done = 0

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.done += steps
        if self.done == 1:
            raise KeyboardInterrupt


class Watched(Silent):
    """Blocks that had been finished before."""

    found = -1

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        with super().track(label, total) as track:
            yield _Watches(self, track) if label.startswith("Original, block") else track


class _Watches:
    def __init__(self, watched: Watched, track: Track) -> None:
        self.watched, self.track = watched, track

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if self.watched.found < 0:
            self.watched.found = steps


def test_it_goes_on_after_the_last_block(sample: Sample, captured: Path, tmp_path: Path) -> None:
    original = Original.open(str(sample.checkpoint), Silent())
    with pytest.raises(KeyboardInterrupt):
        capture_reference(original, tmp_path / "ref", options(), Interrupted())
    assert not (tmp_path / "ref").exists() and list(tmp_path.glob(".glmexport-work-*"))
    watched = Watched()
    resumed = capture_reference(original, tmp_path / "ref", options(), watched)
    assert watched.found == 1
    assert resumed.digest() == CapturedReference.open(captured).capture.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]


def test_another_model_s_reference_is_refused(sample: Sample, captured: Path, tmp_path: Path, run: Run) -> None:
    small_checkpoint(tmp_path / "other", "glm")
    capture_reference(Original.open(str(tmp_path / "other"), Silent()), tmp_path / "ref", options(), Silent())
    outcome = run("validate", sample.bundle, "--reference", tmp_path / "ref")
    assert outcome.code == EXIT_INPUT and "was built from" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def flip(directory: Path) -> None:
    path = directory / "answers" / "zh.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def remove(directory: Path) -> None:
    (directory / "audit.safetensors").unlink()


def link(directory: Path) -> None:
    path = directory / "answers" / "en.safetensors"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def unlist(directory: Path) -> None:
    change(directory, lambda capture: capture["files"].pop())


def leave(directory: Path) -> None:
    def rename(capture: dict[str, list[dict[str, object]]]) -> None:
        for text in capture["texts"]:
            text["language"] = "../../secret"

    change(directory, rename)


def version(directory: Path) -> None:
    change(directory, lambda capture: capture.update(version=2))


def garbage(directory: Path) -> None:
    (directory / REFERENCE).write_bytes(b"\xff{")


def outside_of_the_vocabulary(directory: Path) -> None:
    path = directory / "answers" / "am.safetensors"
    tensors = load_file(path)
    tensors["0.tokens"][0, 0] = 1 << 20
    resign(directory, path, tensors)


def cut(directory: Path) -> None:
    path = directory / "answers" / "am.safetensors"
    tensors = load_file(path)
    tensors["0.nll"] = tensors["0.nll"][:-1].clone()
    resign(directory, path, tensors)


def resign(directory: Path, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from glmexport.foundation.files import sha256

    save_file(tensors, path)

    def renew(capture: dict[str, list[dict[str, object]]]) -> None:
        for entry in capture["files"]:
            if entry["path"] == path.relative_to(directory).as_posix():
                entry.update(size=path.stat().st_size, sha256=sha256(path))

    change(directory, renew)


def change(directory: Path, how: Callable[[dict[str, list[dict[str, object]]]], object]) -> None:
    capture = json.loads((directory / REFERENCE).read_text(encoding="utf-8"))
    how(capture)
    (directory / REFERENCE).write_text(json.dumps(capture), encoding="utf-8")


DAMAGES = (flip, remove, link, unlist, leave, version, garbage, outside_of_the_vocabulary, cut)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_told(damage: Callable[[Path], None], copied: Path, sample: Sample, run: Run) -> None:
    CapturedReference.open(copied)
    damage(copied)
    with pytest.raises(BundleError) as caught:
        CapturedReference.open(copied)
    assert str(copied) in caught.value.message
    outcome = run("validate", sample.bundle, "--reference", copied)
    assert outcome.code == EXIT_INPUT and "Traceback" not in outcome.stderr


def test_command(sample: Sample, captured: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmexport.validation.conditions.ValidationPlan", lambda **_: QUICK)
    arguments = ("reference", sample.checkpoint, "-o", tmp_path / "ref", "--top-k", "200", "--threads", THREADS)
    outcome: Outcome = run(*arguments, "--json")
    assert outcome.code == 0
    assert outcome.document["digest"] == CapturedReference.open(captured).capture.digest()
    assert "200 of 264 tokens a position" in " ".join(outcome.stderr.split())
    assert "original checked against transformers' whole model" in " ".join(outcome.stderr.split())
    assert run(*arguments).code == EXIT_INPUT
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine", encoding="utf-8")
    assert run("reference", sample.checkpoint, "-o", tmp_path / "other", "--force").code == EXIT_INPUT
    assert (tmp_path / "other" / "letter.txt").is_file()


@pytest.mark.parametrize(
    "options", [(), ("--against", "x", "--reference", "y"), ("--reference", "y", "--adapter", "z")]
)
def test_one_original(options: tuple[str, ...], sample: Sample, run: Run) -> None:
    outcome = run("validate", sample.bundle, *options)
    assert outcome.code == EXIT_INPUT and "--against" in outcome.stderr


def test_what_a_capture_hides_is_gated() -> None:
    def verdict(partition: float) -> Verdict:
        bound = CaptureBound(
            top_k=8, tail_mass=0.1, audit_positions=9, kl_mean_nats=0.01, kl_mean_partition_nats=partition
        )
        return capture_gate(bound).verdict

    assert verdict(0.0076) is Verdict.PASS and verdict(0.0074) is Verdict.WARN


def test_the_record_is_strict() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        Capture.model_validate({"surprise": 1})
