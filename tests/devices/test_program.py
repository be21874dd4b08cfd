"""The device's program: what it answers is what this machine answers, however often it is killed."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from builds import THREADS, Sample
from devices.conftest import PROMPTS, TEXTS, Hooked, answered
from safetensors import safe_open
from safetensors.torch import load_file

import glmexport
from glmexport.bundle.bundle import Bundle
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.job import RESULT, read_job
from glmexport.devices.local import LocalRunner
from glmexport.engine.generation import GenerationSession
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent
from glmexport.validation.capture import CapturedReference
from glmexport.wire.runner import program


def test_it_answers_as_this_machine_does(
    sample: Sample, job: Path, reference: CapturedReference, tmp_path: Path
) -> None:
    LocalRunner()(job, tmp_path, Silent())
    answers = DeviceAnswers.open("local", job, tmp_path)
    session = ScoringSession(Bundle.open(sample.bundle), THREADS)
    for index, text in enumerate(reference.texts[:TEXTS]):
        whole = torch.from_numpy(session.logits(text.ids.numpy())[text.prefix - 1 : -1])
        ours, theirs = reference.divergence(index, whole), answers.divergence(index, reference.kept(index))
        for name in vars(ours):
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6)
        audited = reference.audited(index)
        assert audited is not None and torch.equal(answers.audit(index), whole[audited])
    generation = GenerationSession.open(Bundle.open(sample.bundle), THREADS)
    for index in range(PROMPTS):
        assert answers.tokens(index) == generation.tokens(reference.texts[index].ids[:8].tolist(), 6)
    speed = answers.result.speed
    assert speed is not None and len(speed.rounds) == 2 and all(len(each.steps_s) == 3 for each in speed.rounds)
    assert answers.result.nodes and {node.provider for node in answers.result.nodes} == {"CPUExecutionProvider"}


@pytest.mark.parametrize(("label", "steps"), [("Free answers", 1), ("Texts", 2)])
def test_a_killed_run_ends_with_the_same_bytes(job: Path, tmp_path: Path, label: str, steps: int) -> None:
    LocalRunner()(job, tmp_path / "whole", Silent())

    class Killed(KeyboardInterrupt):
        pass

    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        LocalRunner()(job, tmp_path / "results", Hooked(label, steps, stop))
    before = answered(tmp_path / "results")
    assert before and not json.loads((tmp_path / "results" / RESULT).read_text())["complete"]
    times = {name: (tmp_path / "results" / name).stat().st_mtime_ns for name in before}
    LocalRunner()(job, tmp_path / "results", Silent())
    assert answered(tmp_path / "results") == answered(tmp_path / "whole")
    # What there was is not answered again, nor timed.
    assert times == {name: (tmp_path / "results" / name).stat().st_mtime_ns for name in before}


def test_sigkill_at_any_moment(job: Path, tmp_path: Path) -> None:
    LocalRunner()(job, tmp_path / "whole", Silent())
    path = tmp_path / "program.pyz"
    path.write_bytes(program())
    for events in range(1, 12, 3):
        process = subprocess.Popen(
            [sys.executable, path, job, tmp_path / "results"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        for _ in range(events):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    LocalRunner()(job, tmp_path / "results", Silent())
    assert answered(tmp_path / "results") == answered(tmp_path / "whole")


def test_it_ends_with_whoever_attends_it(job: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.pyz"
    path.write_bytes(program())
    process = subprocess.Popen(
        [sys.executable, path, job, tmp_path / "results", "--attended"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(30) == 3
    process.stdout.close()


def test_results_of_another_job_are_not_gone_on_with(job: Path, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/0.safetensors").write_bytes(b"of another job")
    (tmp_path / "answers/99.safetensors").write_bytes(b"of another job")
    (tmp_path / RESULT).write_text(json.dumps({"job_digest": "0" * 64, "files": []}))
    LocalRunner()(job, tmp_path, Silent())
    assert DeviceAnswers.open("local", job, tmp_path).result.complete
    assert not (tmp_path / "answers/99.safetensors").exists()


def test_a_file_that_was_changed_on_the_way_is_named(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    for path in ("job.json", "questions.safetensors"):
        (folder / path).write_bytes((job / path).read_bytes())
    (folder / "bundle").symlink_to((job / "bundle").resolve())
    content = bytearray((folder / "questions.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "questions.safetensors").write_bytes(content)
    with pytest.raises(MachineError, match=r"questions\.safetensors is missing or not the file of the job") as error:
        LocalRunner()(folder, tmp_path / "results", Silent())
    assert error.value.next_step == "Bring the job again."


def test_a_provider_that_the_device_lacks_is_named(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    asked = read_job(job)
    changed = asked.model_copy(update={"provider": asked.provider.model_copy(update={"name": "CUDAExecutionProvider"})})
    (folder / "job.json").write_text(changed.model_dump_json())
    (folder / "questions.safetensors").write_bytes((job / "questions.safetensors").read_bytes())
    (folder / "bundle").symlink_to((job / "bundle").resolve())
    with pytest.raises(MachineError, match="runs on CUDAExecutionProvider, which the device's ONNX Runtime does not"):
        LocalRunner()(folder, tmp_path / "results", Silent())


def test_a_python_without_libraries_is_told(job: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"has no numpy|has no onnxruntime") as error:
        LocalRunner(command=(sys.executable, "-S", "-E"), environment={"PYTHONPATH": ""})(job, tmp_path, Silent())
    assert error.value.next_step.startswith("Install numpy and onnxruntime")
    with pytest.raises(MachineError, match="/no/python cannot be run"):
        LocalRunner(command=("/no/python",))(job, tmp_path, Silent())
    with pytest.raises(MachineError, match=r"the run ended before it was done\..*exit 7"):
        LocalRunner(command=(sys.executable, "-c", "import sys; sys.exit(7)"))(job, tmp_path, Silent())


def test_a_device_that_says_nothing_is_given_up(job: Path, tmp_path: Path) -> None:
    slow = (sys.executable, "-c", "import time; time.sleep(600)")
    with pytest.raises(MachineError, match="has not said a word for 1 s"):
        LocalRunner(command=slow, silence=1)(job, tmp_path, Silent())


@pytest.mark.parametrize(
    "said",
    ["'a' * (1 << 20)", "'[' * 60000 + chr(10)", "'\\x1b[2J' + chr(10)", "'9' * 60000 + chr(10)"],
    ids=("a line without an end", "a deep line", "commands", "a long number"),
)
def test_what_a_device_says_that_is_no_event_is_not_heard(job: Path, tmp_path: Path, said: str) -> None:
    liar = tmp_path / "python"
    liar.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.stdout.write({said})\"\n")
    liar.chmod(0o755)
    with pytest.raises(MachineError, match=r"too long|ended before it was done"):
        LocalRunner(command=(str(liar),))(job, tmp_path / "results", Silent())


def test_it_is_the_same_file_and_runs_where_nothing_of_ours_is() -> None:
    content = program()
    assert content == program()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist()}
    root = Path(glmexport.__file__).parents[1]
    for path, source in sources.items():
        # What serves here is what is carried there, to the byte.
        if source and path != "__main__.py":
            assert source == (root / path).read_text(encoding="utf-8")
        tree = ast.parse(source, path, feature_version=(3, 9))
        imported = {
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        own = {name for name in imported if name.startswith("glmexport")}
        assert {f"{name.replace('.', '/')}.py" for name in own} <= sources.keys()
        assert {name.partition(".")[0] for name in imported - own} <= {*sys.stdlib_module_names, "numpy", "onnxruntime"}
    assert {"glmexport/engine/core/cache.py", "glmexport/engine/core/sequence.py"} <= sources.keys()


def test_its_tensors_are_safetensors(job: Path, tmp_path: Path) -> None:
    LocalRunner()(job, tmp_path, Silent())
    for path in tmp_path.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(load_file(path))
