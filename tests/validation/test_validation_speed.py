"""Speed is measured in processes of their own, and their failures are told as what they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from builds import THREADS, Sample

from glmexport.errors import MachineError
from glmexport.validation import machine
from glmexport.validation.speed import SpeedRequest, measure_speed


def request(runtime: str, directory: Path) -> SpeedRequest:
    return SpeedRequest.model_validate(
        {
            "runtime": runtime,
            "directory": str(directory),
            "prompt": tuple(range(10)),
            "generated_tokens": 3,
            "repetitions": 1,
            "threads": THREADS,
        }
    )


@pytest.mark.parametrize("runtime", ["onnxruntime-genai", "transformers"])
def test_both_runtimes_are_measured(runtime: str, sample: Sample) -> None:
    where = sample.bundle if runtime == "onnxruntime-genai" else sample.checkpoint
    speed = measure_speed(request(runtime, where))
    assert speed.runtime.startswith(f"{runtime} ")
    assert speed.threads == THREADS
    for value in (speed.load_s, speed.ttft_s, speed.prefill_tokens_per_s, speed.decode_tokens_per_s):
        assert math.isfinite(value) and value > 0
    assert speed.prefill_tokens_per_s == pytest.approx(10 / speed.ttft_s)
    # More than an interpreter, less than the machine has.
    assert 10 * 2**20 < speed.peak_memory_bytes < machine.memory_bytes()


def test_a_process_that_fails_is_the_machine_s_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        measure_speed(request("onnxruntime-genai", tmp_path))
    assert "onnxruntime-genai" in caught.value.message and "exit 1" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "same command" in caught.value.next_step


def test_a_process_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(MachineError, match="memory") as caught:
        measure_speed(request("transformers", tmp_path))
    assert "transformers" in caught.value.message


def test_facts_about_this_machine() -> None:
    assert machine.cores() >= 1
    assert machine.memory_bytes() > 2**28
    assert machine.processor_name() and machine.system_name()
    assert {"python", "torch", "onnxruntime", "onnxruntime-genai", "glmexport"} <= set(machine.library_versions())
    assert machine.memory_bandwidth(1) > 1e8
