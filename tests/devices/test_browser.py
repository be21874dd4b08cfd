"""Jobs in a real Chromium: the same answers as from ONNX Runtime here, or a message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from builds import Sample, build
from components import require_browser
from devices.conftest import PROMPTS, TEXTS, Hooked, answered
from models import write_checkpoint
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from glmexport.bundle.bundle import Bundle
from glmexport.devices.answers import DeviceAnswers
from glmexport.devices.browser import BrowserRunner, open_browser
from glmexport.devices.job import Job, PromptQuestion, TextQuestion, read_job, write_job
from glmexport.devices.local import LocalRunner
from glmexport.engine.placement import placement
from glmexport.foundation.errors import BundleError, InputError, MachineError
from glmexport.foundation.files import sha256
from glmexport.foundation.progress import Silent
from glmexport.wire.device.answers import text_answer

VOCABULARY, LONG = 50, 12
WEBGPU = "WebGpuExecutionProvider"


@pytest.fixture(scope="module")
def runner() -> BrowserRunner:
    """The browser, where it and onnxruntime-web can be installed."""
    require_browser()
    return BrowserRunner()


def logits_job(folder: Path, table: NDArray[np.float32], kept: int, provider: str = "CPUExecutionProvider") -> Job:
    """A job whose graph looks up the logits behind each token in ``table`` [vocabulary, vocabulary]."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", size])
        for name, size in (("input_ids", "sequence"), ("attention_mask", "total"))
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", len(table)])
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"], "lookup")
    graph = helper.make_graph([node], "lookup", inputs, [output], [numpy_helper.from_array(table, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "bundle").mkdir(parents=True)
    onnx.save(model, folder / "bundle" / "graph.onnx")
    random = np.random.default_rng(0)
    tokens = np.stack([random.permutation(len(table))[:kept] for _ in range(LONG - 2)]).astype(np.int32)
    ids = random.integers(0, len(table), LONG).astype(np.int32)
    questions = {
        "text.0.ids": ids,
        "text.0.tokens": tokens,
        "text.0.targets": ids[2:],
        "text.0.audit": np.array([0, 7], np.int32),
        "prompt.0.ids": ids[:3],
    }
    save_file(questions, folder / "questions.safetensors")
    paths = ("questions.safetensors", "bundle/graph.onnx")
    job = {
        "bundle_digest": "none",
        "files": [
            {"path": path, "size": (folder / path).stat().st_size, "sha256": sha256(folder / path)} for path in paths
        ],
        "graphs": {
            "scoring": paths[1], "generation": paths[1], "input_ids": "input_ids", "attention_mask": "attention_mask",
            "logits": "logits", "caches": [], "cache_kind": "growing",
        },
        "provider": {"name": provider}, "threads": 1, "end_tokens": [], "context_length": 64,
        "vocabulary_size": len(table), "texts": [2], "prompts": [5], "speed": None,
    }  # fmt: skip
    (folder / "job.json").write_text(Job.model_validate(job).model_dump_json(), encoding="utf-8")
    return read_job(folder)


def table(seed: int = 0) -> NDArray[np.float32]:
    """Random logits, with ties, large ones, and rows of one value."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal((VOCABULARY, VOCABULARY)) * 5).astype(np.float32)
    values[::3] = np.round(values[::3])
    values[1::5] += 300
    values[7] = -88
    return values


@pytest.mark.parametrize("kept", [1, 20, VOCABULARY])
def test_logits_are_reduced_as_numpy_does(runner: BrowserRunner, tmp_path: Path, kept: int) -> None:
    logits_job(tmp_path / "job", table(), kept)
    runner(tmp_path / "job", tmp_path / "results", Silent())
    found = load_file(tmp_path / "results" / "answers" / "0.safetensors")
    asked = {name.removeprefix("text.0."): values for name, values in load_file(
        tmp_path / "job" / "questions.safetensors").items()}  # fmt: skip
    expected = text_answer(table()[asked["ids"][1:-1]], asked["tokens"], asked["targets"], asked["audit"])
    assert found.keys() == expected.keys()
    others = found.pop("log_others"), expected.pop("log_others")
    np.testing.assert_allclose(*others, rtol=1e-7)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    greedy, token = [], asked["ids"][2]
    for _ in range(5):
        greedy.append(token := int(table()[token].argmax()))
    assert load_file(tmp_path / "results" / "tokens" / "0.safetensors")["tokens"].tolist() == greedy


@pytest.fixture(scope="module")
def exact(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's checkpoint as a bundle in fp32."""
    (built,) = build(sample.checkpoint, tmp_path_factory.mktemp("exact") / "bundle", "fp32")
    return built.directory


def random_job(folder: Path, bundle: Path, threads: int, texts: int = 2, provider: str | None = None) -> Path:
    """Random tokens, all of whose logits are kept, and a prompt."""
    import torch

    vocabulary = 264
    drawn = torch.Generator().manual_seed(1)
    asked = [
        TextQuestion(ids, 2, torch.arange(vocabulary).repeat(len(ids) - 2, 1), torch.tensor([0]))
        for ids in (torch.randint(0, vocabulary, (9 + index,), generator=drawn) for index in range(texts))
    ]
    prompt = PromptQuestion(asked[0].ids[:5].tolist(), 6)
    opened = Bundle.open(bundle)
    job = write_job(folder, opened, asked, [prompt], vocabulary_size=vocabulary, speed=None, threads=threads)
    if provider:
        job = job.model_copy(update={"provider": job.provider.model_copy(update={"name": provider})})
        (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    return folder


def compared(job: Path, results: Path, expected: Path) -> tuple[float, bool]:
    """The greatest difference of a logit, and whether the greedy answers are the same."""
    ours, theirs = (DeviceAnswers.open("device", job, folder) for folder in (results, expected))
    texts = range(len(ours.job.texts))
    worst = max(float((ours._answer(index, "logits") - theirs._answer(index, "logits")).abs().max()) for index in texts)
    return worst, ours.tokens(0) == theirs.tokens(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_fp32_answers_as_onnxruntime_here(
    runner: BrowserRunner, exact: Path, tmp_path: Path, threads: int
) -> None:
    job = random_job(tmp_path / "job", exact, threads)
    runner(job, tmp_path / "results", Silent())
    LocalRunner()(job, tmp_path / "local", Silent())
    worst, same = compared(job, tmp_path / "results", tmp_path / "local")
    assert 0 < worst < 1e-4 and same
    device = DeviceAnswers.open("device", job, tmp_path / "results").result.device
    assert f"{threads} threads" in device.runtime and "onnxruntime-web" in device.runtime
    assert device.provider == "CPUExecutionProvider" and device.emulated is None and device.adapter is None
    assert "SIMD, isolated" in device.versions["WebAssembly"]


def test_latents_are_cached_as_here(runner: BrowserRunner, tmp_path: Path) -> None:
    """Caches of a fixed capacity, which our own loop writes into."""
    write_checkpoint(tmp_path / "checkpoint", "glm4_moe_lite", num_hidden_layers=2)
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", "fp32")
    job = random_job(tmp_path / "job", built.directory, 1)
    assert read_job(job).graphs.cache_kind == "capacity"
    runner(job, tmp_path / "results", Silent())
    LocalRunner()(job, tmp_path / "local", Silent())
    worst, same = compared(job, tmp_path / "results", tmp_path / "local")
    assert worst < 1e-4 and same


@pytest.fixture(scope="module")
def whole(runner: BrowserRunner, job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run answers to the job about the w4 bundle."""
    results = tmp_path_factory.mktemp("browser")
    runner(job, results, Silent())
    return results


def test_w4_diverges_little_from_here(whole: Path, job: Path, tmp_path: Path, reference) -> None:
    LocalRunner()(job, tmp_path / "local", Silent())
    ours, theirs = DeviceAnswers.open("browser", job, whole), DeviceAnswers.open("local", job, tmp_path / "local")
    for index in range(TEXTS):
        here, there = (each.divergence(index, reference.kept(index)) for each in (ours, theirs))
        # WebAssembly has no kernel for int8 activations and computes in fp32, which is the more exact one.
        assert float((here.nll_bundle - there.nll_bundle).abs().max()) < 0.05
        assert float(here.kl.mean()) < 2 * float(there.kl.mean())
    speed = ours.result.speed
    assert speed is not None and len(speed.rounds) >= 2 and len(speed.rounds[0].steps_s) == 3
    assert speed.peak_memory_bytes is None or speed.peak_memory_bytes > 1 << 26
    assert ours.result.nodes is not None
    placed = placement(ours.result.nodes, "CPUExecutionProvider")
    assert {each.operator for each in placed.operators} >= {"MatMulNBits", "GroupQueryAttention"}
    assert not placed.unexpected


def kill_renderers() -> None:
    for child in psutil.Process().children(recursive=True):
        if "--type=renderer" in child.cmdline():
            child.kill()


@pytest.mark.parametrize(("label", "steps"), [("Free answers", 1), ("Texts", 2)])
def test_a_killed_page_is_gone_on_with(
    runner: BrowserRunner, job: Path, whole: Path, tmp_path: Path, label: str, steps: int
) -> None:
    progress = Hooked(label, steps, kill_renderers)
    with pytest.raises(MachineError, match=r"the page ended before it was done: .*") as caught:
        runner(job, tmp_path, progress)
    assert progress.happened == 1 and "it goes on" in caught.value.next_step
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert steps <= len(before) < TEXTS + PROMPTS
    assert not json.loads((tmp_path / "result.json").read_text())["complete"]
    runner(job, tmp_path, Silent())
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert answered(tmp_path) == answered(whole)
    # Once more: everything is there, and no browser is started.
    BrowserRunner(chromium=Path("/none"))(job, tmp_path, Silent())


def test_a_changed_file_is_refused(runner: BrowserRunner, job: Path, tmp_path: Path) -> None:
    shutil.copytree(job, tmp_path / "job")
    path = tmp_path / "job" / "bundle" / "weights" / "block_001.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle/weights/block_001.data is not the file that job.json lists"):
        runner(tmp_path / "job", tmp_path / "results", Silent())
    assert not list((tmp_path / "results").glob("*/*"))


def test_a_graph_that_is_refused_says_by_which_operator(runner: BrowserRunner, tmp_path: Path) -> None:
    job = logits_job(tmp_path / "job", table(), 1)
    path = tmp_path / "job" / "bundle" / "graph.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Divine", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    entries = [entry.model_copy(update={"size": path.stat().st_size, "sha256": sha256(path)})
               if entry.path.endswith(".onnx") else entry for entry in job.files]  # fmt: skip
    (tmp_path / "job" / "job.json").write_text(job.model_copy(update={"files": tuple(entries)}).model_dump_json())
    with pytest.raises(BundleError, match=r"opening bundle/graph.onnx: .*Divine"):
        runner(tmp_path / "job", tmp_path / "results", Silent())


def test_an_adapter_in_software_is_none(runner: BrowserRunner, tmp_path: Path) -> None:
    """Where there is no GPU, and none is found, that is a failure."""
    logits_job(tmp_path / "job", table(), 1, WEBGPU)
    if Path("/dev/dri").is_dir():
        pytest.skip("this machine may have a GPU")
    with pytest.raises(MachineError, match=r"browser:webgpu: There is no .*adapter") as caught:
        open_browser("browser:webgpu")(tmp_path / "job", tmp_path / "results", Silent())
    assert "browser:webgpu-software" in caught.value.next_step
    assert not (tmp_path / "results" / "result.json").exists()


@pytest.mark.slow
def test_webgpu_in_software_shows_right_answers_and_no_speed(
    runner: BrowserRunner, exact: Path, tmp_path: Path
) -> None:
    job = random_job(tmp_path / "job", exact, 1, texts=1, provider=WEBGPU)
    open_browser("browser:webgpu-software")(job, tmp_path / "results", Silent())
    LocalRunner()(random_job(tmp_path / "here", exact, 1, texts=1), tmp_path / "local", Silent())
    result = DeviceAnswers.open("device", job, tmp_path / "results").result
    assert result.speed is None and result.device.adapter is not None
    assert result.device.emulated is not None and "nothing of speed" in result.speed_absent_because
    ours, theirs = (load_file(tmp_path / name / "answers" / "0.safetensors") for name in ("results", "local"))
    assert 0 < np.abs(ours["logits"] - theirs["logits"]).max() < 1e-4
    assert result.nodes is not None
    placed = placement(result.nodes, WEBGPU)
    assert placed.on_purpose and not placed.unexpected
    assert any(each.operator == "GroupQueryAttention" and each.provider == WEBGPU for each in placed.operators)


def sized(job: Job, sizes: Sequence[int]) -> Job:
    files = [entry.model_copy(update={"size": size}) for entry, size in zip(job.files, sizes, strict=True)]
    return job.model_copy(update={"files": tuple(files)})


def test_what_no_browser_holds_is_refused_before_it_starts(tmp_path: Path) -> None:
    job = logits_job(tmp_path / "job", table(), 1)
    (tmp_path / "job" / "job.json").write_text(sized(job, [100, 5 << 29]).model_dump_json())
    message = r"2\.50 GiB of weights, 2\.50 GiB to pack the largest file .* more than the 4 GiB"
    with pytest.raises(InputError, match=message):
        BrowserRunner(chromium=Path("/none"))(tmp_path / "job", tmp_path / "results", Silent())


def test_a_bundle_for_another_provider_is_refused(tmp_path: Path) -> None:
    logits_job(tmp_path / "job", table(), 1)
    with pytest.raises(InputError, match=f"runs on CPUExecutionProvider, and this device has {WEBGPU}"):
        BrowserRunner("webgpu")(tmp_path / "job", tmp_path / "results", Silent())


def test_without_a_browser(runner: BrowserRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_job(tmp_path / "job", table(), 1)
    with pytest.raises(MachineError, match="/none cannot be started"):
        BrowserRunner(chromium=Path("/none"))(tmp_path / "job", tmp_path / "results", Silent())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="there is no Chromium on PATH") as caught:
        BrowserRunner()(tmp_path / "job", tmp_path / "results", Silent())
    assert "apt-get install chromium" in caught.value.next_step
    # Told when it is named, before anything is computed.
    with pytest.raises(MachineError, match="there is no Chromium on PATH"):
        open_browser("browser")


@pytest.mark.usefixtures("runner")
def test_names_of_browsers() -> None:
    assert open_browser("browser") == open_browser("browser:wasm") == BrowserRunner("wasm")
    assert open_browser("browser:webgpu-software").name == "browser:webgpu-software"
    with pytest.raises(InputError, match="'browser:firefox' is no browser"):
        open_browser("browser:firefox")
