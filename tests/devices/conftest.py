"""A job about the small bundle, for devices behind a real sshd on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builds import QUICK, THREADS, Sample, run, sample
from sshd import sshd

from glmexport.bundle.bundle import Bundle
from glmexport.devices.job import PromptQuestion, SpeedRequest, TextQuestion, write_job
from glmexport.foundation.progress import Silent, Track
from glmexport.validation.capture import CapturedReference
from glmexport.workflows.capture import CaptureOptions, capture_reference
from glmexport.workflows.original import Original

__all__ = ["run", "sample", "sshd"]
TEXTS, PROMPTS = 4, 2


@pytest.fixture(scope="session")
def captured(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's original, of whose 264 tokens 200 are kept, with its free answers."""
    directory = tmp_path_factory.mktemp("captured") / "ref"
    options = CaptureOptions(THREADS, QUICK, top_k=200)
    capture_reference(Original.open(str(sample.checkpoint), Silent()), directory, options, Silent())
    return directory


@pytest.fixture(scope="session")
def reference(captured: Path) -> CapturedReference:
    return CapturedReference.open(captured)


def questions(reference: CapturedReference, count: int = TEXTS) -> list[TextQuestion]:
    return [
        TextQuestion(text.ids, text.prefix, reference.kept(index).tokens, reference.audited(index))
        for index, text in enumerate(reference.texts[:count])
    ]


@pytest.fixture(scope="session")
def job(sample: Sample, reference: CapturedReference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some texts, some prompts, and two rounds of speed."""
    folder = tmp_path_factory.mktemp("job") / "job"
    asked = questions(reference)
    write_job(
        folder,
        Bundle.open(sample.bundle),
        asked,
        [PromptQuestion(text.ids[:8].tolist(), 6) for text in asked[:PROMPTS]],
        vocabulary_size=reference.capture.vocabulary_size,
        speed=SpeedRequest(prompt=tuple(asked[0].ids.tolist()), generated_tokens=4, rounds=2, seconds=0),
        threads=THREADS,
    )
    return folder


def answered(results: Path) -> dict[str, bytes]:
    """Every answer, byte for byte."""
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in sorted(results.glob("*/*.safetensors"))}


class Hooked(Silent):
    """Does something once a step of some work is done."""

    def __init__(self, label: str, steps: int, then: Callable[[], None]) -> None:
        super().__init__()
        self.label, self.steps, self.then = label, steps, then
        self.seen: dict[str, int] = {}
        self.happened = 0

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        with super().track(label, total) as track:
            yield _HookedTrack(self, label, track)


class _HookedTrack:
    def __init__(self, hooked: Hooked, label: str, track: Track) -> None:
        self.hooked, self.label, self.track = hooked, label, track

    def advance(self, steps: int = 1, detail: str = "") -> None:
        hooked = self.hooked
        hooked.seen[self.label] = hooked.seen.get(self.label, 0) + steps
        if self.label == hooked.label and hooked.seen[self.label] >= hooked.steps and not hooked.happened:
            hooked.happened += 1
            hooked.then()
