"""Runtimes take turns in processes of their own, and their failures are told as what they are."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from builds import THREADS, Sample

from glmexport.foundation import machine
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent
from glmexport.validation import speed
from glmexport.validation.runtimes import Round, RuntimeName, RuntimeRequest
from glmexport.validation.speed import LEAST_ROUNDS, Worker, take_turns
from glmexport.wire.device.facts import memory_bandwidth

PROMPT = tuple(range(10))
TOKENS = 3


def request(runtime: RuntimeName, directory: Path) -> RuntimeRequest:
    return RuntimeRequest(
        runtime=runtime, directory=str(directory), prompt=PROMPT, generated_tokens=TOKENS, threads=THREADS
    )


def test_both_runtimes_take_turns(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = Worker.ask

    def noted(worker: Worker, command: str, kind: type) -> object:
        asked.append(f"{command} {worker.request.runtime}")
        return ask(worker, command, kind)

    monkeypatch.setattr(Worker, "ask", noted)
    requests = [request("onnxruntime-genai", sample.bundle), request("transformers", sample.checkpoint)]
    bundle, original = take_turns(requests, 0, Silent())
    a, b = "onnxruntime-genai", "transformers"
    assert asked == [
        *(f"generate {name}" for name in (a, b, b, a)),
        *(f"memory {name}" for name in (a, b)),
        f"place {a}",
    ]
    for turns, name in ((bundle, a), (original, b)):
        assert turns.runtime.startswith(f"{name} ") and turns.threads == THREADS
        assert len(turns.rounds) == 2
        for taken in turns.rounds:
            assert len(taken.steps_s) == TOKENS - 1
            assert all(math.isfinite(value) and value > 0 for value in (turns.load_s, taken.ttft_s, *taken.steps_s))
            assert (taken.decode_j is None) == (turns.memory.energy_absent_because is not None)
        # More than an interpreter, less than the machine has.
        assert 10 * 2**20 < turns.memory.bytes < machine.memory_bytes()
    assert bundle.memory.bytes < original.memory.bytes
    # Every decoder block has four quantized matrices, and the head is one.
    operators = [node.operator for node in bundle.nodes]
    assert operators.count("MatMulNBits") == 2 * 4 + 1
    assert {node.provider for node in bundle.nodes} == {"CPUExecutionProvider"}
    assert original.nodes == ()


def test_rounds_go_on_for_the_time_that_is_given() -> None:
    def rounds(seconds: float, each: float) -> int:
        taken = 0
        while speed.goes_on(taken, taken * each, seconds):
            taken += 1
        return taken

    assert rounds(0, 1) == 2
    assert rounds(25, 100) == LEAST_ROUNDS
    assert rounds(25, 1) == 26  # and not 25: a whole number of ABBA
    assert rounds(25, 0.5) == 50


@pytest.mark.parametrize("name", ["onnxruntime-genai", "transformers"])
def test_a_process_that_fails_is_the_machine_s_fault(tmp_path: Path, name: RuntimeName) -> None:
    with pytest.raises(MachineError) as caught:
        take_turns([request(name, tmp_path / "nowhere")], 0, Silent())
    assert name in caught.value.message and "exit 1" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "same command" in caught.value.next_step


def test_a_process_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(MachineError, match="memory") as caught:
        take_turns([request("transformers", tmp_path)], 0, Silent())
    assert "transformers" in caught.value.message and "SIGKILL" in caught.value.message


def test_a_process_that_dies_between_two_turns(sample: Sample) -> None:
    with Worker(request("onnxruntime-genai", sample.bundle)) as worker:
        assert worker.ask("generate", Round).ttft_s > 0
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(MachineError, match=r"onnxruntime-genai failed \(killed by SIGKILL\)"):
            worker.ask("generate", Round)
    assert worker._process.stdout is not None and worker._process.stdout.closed
    worker.close()


def test_no_process_outlives_a_failure(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def noted(*arguments: object, **options: object) -> subprocess.Popen[str]:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    requests = [request("onnxruntime-genai", sample.bundle), request("transformers", tmp_path)]
    with pytest.raises(MachineError):
        take_turns(requests, 0, Silent())
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_the_measuring_process_of_a_bundle_does_not_load_torch() -> None:
    """Its peak memory would be torch's."""
    code = "import sys, glmexport.validation.runtimes; sys.exit(int('torch' in sys.modules or 'scipy' in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_facts_about_this_machine() -> None:
    assert machine.cores() >= 1
    assert machine.memory_bytes() > 2**28
    assert machine.processor_name() and machine.system_name()
    assert {"python", "torch", "onnxruntime", "onnxruntime-genai", "glmexport"} <= set(machine.library_versions())
    bandwidth = memory_bandwidth(1)
    assert bandwidth is not None and bandwidth > 1e8
    # Read twice, and the peak only grows.
    before = machine.peak_memory()
    used, source = machine.peak_memory_and_source()
    assert used >= before > 10 * 2**20 and source
