"""Results that are not what they should be are refused, and the file is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.local import LocalRunner
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent


@pytest.fixture(scope="module")
def answers(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("answers")
    LocalRunner()(job, results, Silent())
    return results


def record(results: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change result.json."""
    content = json.loads((results / "result.json").read_text())
    change(content)
    (results / "result.json").write_text(json.dumps(content))


def signed(results: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change tensors of a file, and its entry with it: a device that lies consistently."""
    save_file({key: value.contiguous() for key, value in change(load_file(results / name)).items()}, results / name)
    content = (results / name).read_bytes()

    def entry(result: dict[str, Any]) -> None:
        (found,) = (each for each in result["files"] if each["path"] == name)
        found["size"], found["sha256"] = len(content), hashlib.sha256(content).hexdigest()

    record(results, entry)


def with_nan(tensors: dict[str, torch.Tensor], name: str = "logits") -> dict[str, torch.Tensor]:
    tensors[name].view(-1)[0] = torch.nan
    return tensors


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "an escaping path": (
        lambda r: record(r, lambda c: c["files"][0].update(path="../../escaped.safetensors")),
        r"does not list exactly the files of this job; first \.\./\.\./escaped",
    ),
    "an absolute path": (
        lambda r: record(r, lambda c: c["files"][0].update(path="/etc/passwd")),
        "does not list exactly the files of this job; first /etc/passwd",
    ),
    "one file twice": (
        lambda r: record(r, lambda c: c["files"].append(c["files"][0])),
        "does not list exactly the files of this job",
    ),
    "a file too few": (lambda r: record(r, lambda c: c["files"].pop()), "does not list exactly the files of this job"),
    "a size that cannot be": (
        lambda r: record(r, lambda c: c["files"][0].update(size=1 << 40)),
        "the size or digest of answers/0.safetensors cannot be",
    ),
    "another job": (lambda r: record(r, lambda c: c.update(job_digest="0" * 64)), "answers another job"),
    "an unfinished run": (lambda r: record(r, lambda c: c.update(complete=False)), "the run was not finished"),
    "an unknown key": (lambda r: record(r, lambda c: c.update(verdict="PASS")), "result.json: verdict"),
    "no device": (lambda r: record(r, lambda c: c.pop("device")), "result.json: device"),
    "a negative time": (
        lambda r: record(r, lambda c: c["speed"]["rounds"][0].update(ttft_s=-1)),
        "result.json: speed.rounds.0.ttft_s",
    ),
    "neither speed nor reason": (lambda r: record(r, lambda c: c.update(speed=None)), "a speed or why there is none"),
    "no result": (lambda r: (r / "result.json").unlink(), "there is no result.json"),
    "not JSON": (lambda r: (r / "result.json").write_text("<html>"), "result.json: "),
    "a changed byte": (
        lambda r: (r / "answers/1.safetensors").write_bytes(
            (r / "answers/1.safetensors").read_bytes()[:-1] + b"\x7f"
        ),
        r"answers/1\.safetensors is not the file that result\.json lists",
    ),
    "a missing file": (lambda r: (r / "tokens/0.safetensors").unlink(), r"tokens/0\.safetensors is missing"),
    "a NaN": (lambda r: signed(r, "answers/2.safetensors", with_nan), r"answers/2\.safetensors: logits has a value"),
    "an infinite rest": (
        lambda r: signed(r, "answers/0.safetensors", lambda t: {**t, "log_others": t["log_others"] + torch.inf}),
        r"answers/0\.safetensors: log_others has a value that is no number",
    ),
    "a wrong shape": (
        lambda r: signed(r, "answers/0.safetensors", lambda t: {**t, "target": t["target"][:-1]}),
        r"answers/0\.safetensors: target is \[23\], not \[24\]",
    ),
    "a wrong type": (
        lambda r: signed(r, "answers/0.safetensors", lambda t: {**t, "top": t["top"].long()}),
        r"answers/0\.safetensors: top is torch\.int64",
    ),
    "a missing tensor": (
        lambda r: signed(r, "answers/0.safetensors", lambda t: {k: v for k, v in t.items() if k != "audit"}),
        r"answers/0\.safetensors: has log_others, logits, target, top, not audit",
    ),
    "a token that is none": (
        lambda r: signed(r, "answers/0.safetensors", lambda t: {**t, "top": t["top"] + 100_000}),
        r"answers/0\.safetensors: top has a token outside of 0 to 263",
    ),
    "no answer": (
        lambda r: signed(r, "tokens/1.safetensors", lambda t: {"tokens": t["tokens"][:0]}),
        r"tokens/1\.safetensors: tokens is not 1 to 6 int32",
    ),
    "an endless answer": (
        lambda r: signed(r, "tokens/1.safetensors", lambda t: {"tokens": t["tokens"].repeat(9)}),
        r"tokens/1\.safetensors: tokens is not 1 to 6 int32",
    ),
    "an answer behind its end": (
        lambda r: signed(r, "tokens/1.safetensors", lambda t: {"tokens": torch.tensor([256, 1], dtype=torch.int32)}),
        r"tokens/1\.safetensors: tokens go on behind an end token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(job: Path, answers: Path, tmp_path: Path, name: str) -> None:
    results = shutil.copytree(answers, tmp_path / "results")
    DeviceAnswers.open("edge", job, results)
    change, message = HOSTILE[name]
    change(results)
    with pytest.raises(MachineError, match=message) as error:
        DeviceAnswers.open("edge", job, results)
    assert error.value.message.startswith("edge: ") and error.value.next_step


def test_links_are_refused(job: Path, answers: Path, tmp_path: Path) -> None:
    results = shutil.copytree(answers, tmp_path / "results")
    (results / "answers").rename(tmp_path / "elsewhere")
    (results / "answers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="missing or not a real file"):
        DeviceAnswers.open("edge", job, results)
