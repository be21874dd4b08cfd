"""Energy, placement, the limits on speed, and what is reported where there is nothing to compare with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
from builds import THREADS, TURNS, Sample, no_turns
from onnx import TensorProto, helper

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.names import MODEL
from glmexport.engine.placement import Node, nodes_of, placement, profile
from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import PerformanceLimits, open_policy, open_target
from glmexport.results.performance import Figure, Interval, Performance
from glmexport.results.record import Verdict
from glmexport.validation.conditions import Conditions, ValidationPlan
from glmexport.validation.energy import Rapl, open_rapl
from glmexport.validation.performance import measure_performance
from glmexport.validation.performance_gates import performance_gates, placement_gate
from glmexport.validation.runtimes import Memory, Round, RuntimeRequest
from glmexport.validation.speed import Turns
from glmexport.workflows.original import Original

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def zone(root: Path, name: str, label: str, energy: int, limit: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, value in (("name", label), ("energy_uj", energy), ("max_energy_range_uj", limit)):
        (folder / file).write_text(f"{value}\n", encoding="ascii")
    return folder / "energy_uj"


def test_energy_of_packages_and_memory(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    rapl = open_rapl(tmp_path)
    assert isinstance(rapl, Rapl) and len(rapl.zones) == 3
    before = rapl.read()
    for counter, value in ((first, 300), (second, 50), (memory, 6)):  # the second has wrapped around
        counter.write_text(str(value), encoding="ascii")
    assert rapl.joules(before, rapl.read()) == pytest.approx((200 + 150 + 1) * 1e-6)
    assert rapl.joules(before, before) == 0


def test_why_there_is_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no energy counters" in str(open_rapl(tmp_path / "nothing"))
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    counter.write_text("not a number", encoding="ascii")
    assert "cannot be read" in str(open_rapl(tmp_path))
    read = Path.read_text

    def refused(path: Path, *arguments: str, **options: str) -> str:
        # Not by chmod, which an administrator does not notice.
        if path == counter:
            raise PermissionError(13, "denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    assert "administrator" in str(open_rapl(tmp_path))


def node(name: str, operator: str, provider: str, small: bool = False) -> Node:
    return Node(name=name, operator=operator, provider=provider, small=small)


def test_only_shapes_may_stay_on_the_cpu() -> None:
    nodes = (
        node("matmul", "MatMulNBits", CUDA),
        node("matmul2", "MatMulNBits", CUDA),
        node("length", "Gather", CPU, small=True),
        node("embedding", "Gather", CPU),
        node("tiny", "Softmax", CPU, small=True),
        node("fused", "Subgraph", "OpenVINOExecutionProvider"),
    )
    found = placement(nodes, CUDA)
    assert found.nodes == 6
    assert [(row.provider, row.operator, row.nodes) for row in found.operators] == [
        (CPU, "Gather", 2),
        (CPU, "Softmax", 1),
        (CUDA, "MatMulNBits", 2),
        ("OpenVINOExecutionProvider", "Subgraph", 1),
    ]
    assert found.on_purpose == ("length (Gather)",)
    assert found.unexpected == (
        f"embedding (Gather) on {CPU}",
        f"tiny (Softmax) on {CPU}",
        "fused (Subgraph) on OpenVINOExecutionProvider",
    )
    gate = placement_gate(found)
    assert (gate.verdict, gate.value) == (Verdict.BLOCK, 3)
    assert "6 nodes" in gate.sample and "1 compute shapes" in gate.sample and "embedding" in gate.sample
    # On a target of the CPU's nothing is beside it; and nothing seen is nothing proved.
    assert placement_gate(placement(nodes[2:5], CPU)).verdict is Verdict.PASS
    assert placement_gate(placement((), CPU)).verdict is Verdict.INCONCLUSIVE


def profiled(path: Path, prefix: Path, lengths: tuple[int, ...]) -> list[dict[str, object]]:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    session = onnxruntime.InferenceSession(path, options, providers=[CPU])
    for length in lengths:
        session.run(None, {"x": np.ones((1, length), np.float32)})
    events: list[dict[str, object]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def test_the_profile_of_a_session_names_its_nodes(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["shape"], name="shape"),
            helper.make_node("ReduceSum", ["shape"], ["total"], name="total"),
            helper.make_node("Softmax", ["x"], ["y"], name="softmax"),
            helper.make_node("Cast", ["x"], ["whole"], name="whole", to=TensorProto.INT64),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, "n"))],
        [
            helper.make_tensor_value_info("total", TensorProto.INT64, None),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("whole", TensorProto.INT64, None),
        ],
    )
    path = tmp_path / "small.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    events = profiled(path, tmp_path / "profile", (1, 200))
    found = {each.name: (each.operator, each.provider, each.small) for each in nodes_of(events)}
    assert found == {
        "shape": ("Shape", CPU, True),
        "total": ("ReduceSum", CPU, True),
        "softmax": ("Softmax", CPU, False),
        "whole": ("Cast", CPU, False),
    }


def test_a_node_that_is_small_only_with_one_token_is_not_small() -> None:
    def event(elements: int) -> dict[str, object]:
        shapes = [{"int64": [1, elements]}]
        facts = {"provider": CPU, "op_name": "Add", "input_type_shape": shapes, "output_type_shape": shapes}
        return {"cat": "Node", "name": "add_kernel_time", "args": facts}

    assert nodes_of([event(1)])[0].small
    for order in ((1, 200), (200, 1)):
        (found,) = nodes_of([event(elements) for elements in order])
        assert found.name == "add" and not found.small
    assert nodes_of([{"cat": "Session", "name": "model_run", "args": {}}]) == ()


def test_every_node_of_a_bundle_runs_on_its_provider(sample: Sample) -> None:
    nodes = profile(Bundle.open(sample.bundle), list(range(10)), THREADS)
    found = placement(nodes, CPU)
    assert found.unexpected == () and found.on_purpose == ()
    session = onnxruntime.InferenceSession(sample.bundle / MODEL, providers=[CPU])
    assert found.nodes > 20 and session.get_providers() == [CPU]
    # If the target were another's, arithmetic on the CPU would be told, and shapes would not.
    other = placement(nodes, CUDA)
    assert any("(MatMulNBits) on CPUExecutionProvider" in each for each in other.unexpected)
    assert not any("(Shape)" in each for each in other.unexpected) and other.on_purpose


def estimate(value: float, lower: float, upper: float) -> Figure:
    return Figure(value=value, lower=lower, upper=upper, confidence=0.95, n=8, p90=None, p99=None)


@pytest.fixture
def measured(sample: Sample) -> Performance:
    found = sample.built.report.performance
    assert found.ratios is not None
    bundle = found.bundle.model_copy(
        update={
            "ttft_s": estimate(0.2, 0.19, 0.22),
            "decode_tokens_per_s": estimate(10, 9, 12),
            "prefill_tokens_per_s": estimate(500, 480, 520),
            "peak_memory_bytes": 2**30,
            "energy_j_per_token": None,
            "energy_absent_because": "No counters.",
        }
    )
    decode = Interval(value=3, lower=2.8, upper=3.1, confidence=0.95, n=8)
    ratios = found.ratios.model_copy(update={"decode_tokens_per_s": decode, "energy_j_per_token": None})
    return found.model_copy(update={"bundle": bundle, "ratios": ratios})


@pytest.mark.parametrize(
    ("limits", "name", "verdict"),
    [
        ({"max_ttft_s": 0.22}, "Time to first token", Verdict.PASS),
        ({"max_ttft_s": 0.21}, "Time to first token", Verdict.INCONCLUSIVE),
        ({"max_ttft_s": 0.18}, "Time to first token", Verdict.BLOCK),
        ({"min_prefill_tokens_per_s": 480}, "Prefill", Verdict.PASS),
        ({"min_decode_tokens_per_s": 9}, "Decode", Verdict.PASS),
        ({"min_decode_tokens_per_s": 11}, "Decode", Verdict.INCONCLUSIVE),
        ({"min_decode_tokens_per_s": 12.5}, "Decode", Verdict.BLOCK),
        ({"min_decode_ratio": 2.5}, "Decode, bundle / original", Verdict.PASS),
        ({"min_decode_ratio": 3.2}, "Decode, bundle / original", Verdict.BLOCK),
        ({"max_peak_memory": "1GiB"}, "Peak memory", Verdict.PASS),
        ({"max_peak_memory": "1GB"}, "Peak memory", Verdict.BLOCK),
        ({"max_energy_j_per_token": 1}, "Energy per token", Verdict.INCONCLUSIVE),
    ],
)
def test_limits_are_judged_by_the_bounds(
    measured: Performance, limits: dict[str, float | str], name: str, verdict: Verdict
) -> None:
    policy = open_target("x86-avx2").gates
    assert [gate.name for gate in performance_gates(measured, policy)] == ["Nodes on another provider"]
    policy = policy.model_copy(update={"performance": PerformanceLimits.model_validate(limits)})
    _, gate = performance_gates(measured, policy)
    assert (gate.name, gate.verdict) == (name, verdict)


def test_a_limit_on_what_was_not_measured_is_not_kept(measured: Performance) -> None:
    policy = open_target("x86-avx2").gates
    limits = PerformanceLimits(min_decode_ratio=1, min_decode_tokens_per_s=0.001)
    policy = policy.model_copy(update={"performance": limits})
    alone = measured.model_copy(update={"ratios": None, "original": None, "original_absent_because": "Too large."})
    *_, gate = performance_gates(alone, policy)
    assert gate.verdict is Verdict.INCONCLUSIVE and gate.sample == "Too large." and math.isnan(gate.value)
    broken = measured.bundle.model_copy(update={"decode_tokens_per_s": estimate(math.nan, math.nan, math.nan)})
    _, gate, _ = performance_gates(measured.model_copy(update={"bundle": broken}), policy)
    assert gate.verdict is Verdict.INCONCLUSIVE


def test_limits_in_a_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    text = "kl_mean_nats = 0.1\nln_perplexity_ratio = 0.1\ntop1_agreement = 0.8\nminimum_positions = 10\n"
    text += "[performance]\n"
    path.write_text(text + 'max_peak_memory = "8GiB"\nmin_decode_ratio = 1.5\n', encoding="utf-8")
    limits = open_policy(path).gates.performance
    assert limits.max_peak_memory == 8 * 2**30 and limits.min_decode_ratio == 1.5 and limits.max_ttft_s is None
    for wrong in ('max_peak_memory = "8 apples"', "max_ttft = 1", "min_decode_ratio = 0"):
        path.write_text(text + wrong + "\n", encoding="utf-8")
        with pytest.raises(DefinitionError, match=wrong.split()[0]):
            open_policy(path)


def measure(sample: Sample, checkpoint: Path | None) -> Performance:
    original = Original.open(str(checkpoint), Silent()).checkpoint if checkpoint else None
    bundle = Bundle.open(sample.bundle)
    plan = ValidationPlan(generated_tokens=4, speed_seconds=0)
    policy = bundle.target.gates.model_copy(update={"confidence": 0.95})
    return measure_performance(bundle, original, list(range(8)), Conditions(plan, policy, THREADS, THREADS, Silent()))


def test_the_bundle_alone(sample: Sample) -> None:
    found = measure(sample, None)
    assert found.original is None and found.ratios is None and found.original_absent_because is not None
    assert "captured" in found.original_absent_because
    assert found.rounds == 2 and found.bundle.ttft_s.n == 2
    assert (found.bundle.ttft_s.lower, found.bundle.ttft_s.upper) == (0, math.inf)
    assert found.bundle.prefill_tokens_per_s.value > 0 and found.placement.unexpected == ()


def test_an_original_that_does_not_fit_beside_the_bundle(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Full)
    with patch(TURNS, no_turns):
        found = measure(sample, sample.checkpoint)
    assert found.original is None and "more than this machine has free" in str(found.original_absent_because)


def test_what_the_rounds_come_to(sample: Sample) -> None:
    """By hand: the bundle takes 0.5 s and 0.1 s a token, the original twice that, and both become slower."""

    def turns(requests: list[RuntimeRequest], *_: object) -> list[Turns]:
        assert [request.runtime for request in requests] == ["onnxruntime-genai", "transformers"]
        assert all(request.prompt == tuple(range(8)) for request in requests)
        drift = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
        rounds = [
            tuple(
                Round(ttft_s=0.5 * factor * slow, steps_s=(0.1 * factor * slow,) * 3, decode_j=6.0 * factor)
                for slow in drift
            )
            for factor in (1, 2)
        ]
        memory = Memory(bytes=5, source="VmHWM", energy_absent_because=None)
        return [Turns("x", 1, 2.0, each, memory) for each in rounds]

    with patch(TURNS, turns):
        found = measure(sample, sample.checkpoint)
    assert found.original is not None and found.ratios is not None and found.bundle.energy_j_per_token is not None
    assert found.bundle.ttft_s.value == pytest.approx(0.625)
    assert found.bundle.decode_tokens_per_s.value == pytest.approx(np.median([10 / s for s in (1.2, 1.3)]))
    assert found.bundle.prefill_tokens_per_s.value == pytest.approx(np.median([16 / s for s in (1.2, 1.3)]))
    assert found.bundle.energy_j_per_token.value == pytest.approx(2)
    assert found.original.load_s.value == 2 and found.original.load_s.upper == math.inf
    # Both drifted together, and the ratios do not at all.
    for ratio, expected in ((found.ratios.ttft_s, 0.5), (found.ratios.decode_tokens_per_s, 2)):
        assert (ratio.value, ratio.lower, ratio.upper) == pytest.approx((expected,) * 3)
    assert found.bundle.ttft_s.upper > found.bundle.ttft_s.value
