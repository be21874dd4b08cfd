"""A report with realistic numbers and hostile text, built without any measurement."""

from __future__ import annotations

import math

from glmexport.foundation.target import Gates
from glmexport.report.document import (
    CalibrationSummary,
    GroupResult,
    LinearResult,
    Machine,
    PolicySummary,
    QuantizationSummary,
    Report,
    Size,
    Subject,
)
from glmexport.results.arithmetic import OriginalArithmetic
from glmexport.results.behaviour import Answer, Behaviour, Concurrency, LanguageBehaviour, TaskGroup, Translation
from glmexport.results.device import DeviceFacts, DeviceResult
from glmexport.results.fidelity import Estimate, Fidelity, LanguageFidelity, Overlap, PositionBand, Share, WorstToken
from glmexport.results.gate import Gate
from glmexport.results.paired import Paired
from glmexport.results.performance import Figure, Interval, Performance, PlacedOperators, Placement, Speed, SpeedRatios
from glmexport.results.prompts import PromptDifference, PromptParity
from glmexport.results.record import Verdict, worst
from glmexport.validation.statistics import Kind

ATTACK = "<script>alert(1)</script>"

# tag, perplexity of the original, mean divergence in nats
LANGUAGES = (
    ("en", 9.84, 0.0131),
    ("zh", 12.6, 0.0148),
    ("fr", 8.91, 0.0169),
    ("es", 9.12, 0.0163),
    ("ru", 10.3, 0.0187),
    ("tr", 14.7, 0.0228),
    ("hi", 7.35, 0.0266),
    ("sw", 21.9, 0.0348),
    ("ar", 13.8, 0.0412),
)


def language(tag: str, perplexity: float, mean: float, positions: int = 6144) -> LanguageFidelity:
    return LanguageFidelity(
        language=tag,
        documents=24 * positions // 6144,
        positions=positions,
        perplexity_original=perplexity,
        perplexity_bundle=perplexity * (1 + mean * 0.6),
        kl_mean_nats=mean,
        kl_p50_nats=mean / 6.5,
        kl_p99_nats=mean * 9.1,
        kl_p999_nats=mean * 24,
        kl_max_nats=mean * 71,
        top1_agreement=0.985 - mean,
        rms_delta_p=0.6 * mean,
        kl=estimate(mean, "positive", positions),
        ln_perplexity_ratio=estimate(math.log1p(mean * 0.6), "signed", positions),
        top1_disagreement=estimate(0.015 + mean, "share", positions),
    )


def estimate(value: float, kind: Kind, positions: int) -> Estimate:
    return Estimate(
        value=value, standard_error=value / 12, documents=24 * positions // 6144, positions=positions, kind=kind
    )


def interval(value: float) -> Interval:
    return Interval(value=value, lower=value * 0.98, upper=value * 1.03, confidence=0.95, n=8)


def figure(value: float, n: int = 8) -> Figure:
    lower, upper = (value * 0.98, value * 1.03) if n > 4 else (0.0, math.inf)
    return Figure(value=value, lower=lower, upper=upper, confidence=0.95, n=n, p90=None, p99=None)


def gates(languages: tuple[LanguageFidelity, ...]) -> tuple[Gate, ...]:
    divergence = tuple(
        Gate(
            name="Mean divergence",
            language=row.language,
            value=row.kl_mean_nats,
            limit=0.04 if row.language in ("ar", "sw") else 0.05,
            unit="nats",
            direction="at most",
            sample=f"{row.positions} positions in {row.documents} documents",
            verdict=Verdict.BLOCK if row.language == "ar" else Verdict.WARN if row.language == "sw" else Verdict.PASS,
            lower=row.kl_mean_nats * 0.87,
            upper=row.kl_mean_nats * 1.15,
            confidence=0.95,
        )
        for row in languages
        if row.language in ("ar", "sw", "en", "zh")
    )
    return (
        *divergence,
        Gate(
            name="Same next token, worst language", language="ar", value=0.9438, limit=0.93, unit="fraction",
            direction="at least", sample="6144 positions in 24 documents", verdict=Verdict.PASS,
        ),
        Gate(
            name="Generation speed", language=None, value=11.4, limit=5.0, unit="tokens/s",
            direction="at least", sample="median of 7 repetitions", verdict=Verdict.PASS,
        ),
        Gate(
            name="Time to first token", language=None, value=1.93, limit=2.0, unit="s",
            direction="at most", sample="median of 7 repetitions; 64 would certify a 90th percentile",
            verdict=Verdict.INCONCLUSIVE, documents_needed=64,
        ),
        Gate(
            name="Evaluation text seen in calibration", language=None, value=0, limit=0, unit="documents",
            direction="at most", sample="216 evaluation documents", verdict=Verdict.PASS,
        ),
    )  # fmt: skip


def worst_tokens() -> tuple[WorstToken, ...]:
    rows = (
        (
            "ar",
            "ar-017",
            "وقالت وزارة الصحة إن عدد المرضى في المستشفى بلغ",
            " مئة",
            " ألف",
            2.93,
            0.812,
            0.0413,
        ),
        (
            "en",
            f"en-003 {ATTACK}",
            f"The page contained the text {ATTACK} and then\n",
            ATTACK,
            " the",
            1.71,
            0.64,
            0.09,
        ),
        ("zh", "zh-008", "患者应在医生指导下每日服用两次，每次", "一片", "两片", 1.52, 0.571, 0.118),
        (
            "sw",
            "sw-021",
            "Hospitali ya wilaya ilipokea dawa mpya kutoka",
            " Wizara",
            " wizara",
            1.33,
            0.71,
            0.21,
        ),
        ("en", "en-011", "user\u202etxt.exe says \u0000 ", "", "\t", 1.02, 0.5, 0.2),
        ("fr", "fr-002", "La posologie est de deux comprimés par", " jour", " jour", 0.92, 0.98, 0.42),
    )
    return tuple(
        WorstToken(
            language=tag, document=document, position=100 + 37 * index, context=context, expected=expected,
            given=given, kl_nats=divergence, probability_original=original, probability_bundle=bundle,
        )
        for index, (tag, document, context, expected, given, divergence, original, bundle) in enumerate(rows)
    )  # fmt: skip


def linears(layers: int) -> tuple[LinearResult, ...]:
    results = []
    for layer in range(layers):
        for index, part in enumerate(("qkv", "o", "gate_up", "down")):
            error = 0.0021 * (1 + 0.9 * math.sin(layer * 0.7 + index)) * (1 + index) * (6 if layer == 1 else 1)
            bits = 8 if part == "down" and layer < 2 else 4
            results.append(
                LinearResult(
                    name=f"model.layers.{layer}.{part}", layer=layer, part=part, bits=bits, group_size=32,
                    symmetric=False, bits_per_weight=bits + 0.625,
                    relative_error=error / (200 if bits == 8 else 1) + 1e-5,
                    round_to_nearest_error=error * 2.3 + 1e-5, damping=0.01,
                    dead_columns=3 if (layer, part) == (0, "down") else 0,
                    effective_tokens_per_column=61_000.0 - 800 * layer,
                )
            )  # fmt: skip
    for part in ("embedding", "lm_head"):
        results.append(
            LinearResult(
                name=part, layer=None, part=part, bits=8, group_size=32, symmetric=True, bits_per_weight=8.5,
                relative_error=2.3e-5, round_to_nearest_error=2.3e-5, damping=0.0, dead_columns=0,
                effective_tokens_per_column=None,
            )
        )  # fmt: skip
    return tuple(results)


def groups(results: tuple[LinearResult, ...]) -> tuple[GroupResult, ...]:
    """Every matrix a group; the later in the model, the more it costs."""
    return tuple(
        GroupResult(
            name=f"block {linear.layer} {linear.part}" if linear.layer is not None else linear.part,
            matrices=(linear.name,), bits=linear.bits, group_size=linear.group_size, symmetric=linear.symmetric,
            stored_bits=1000 * linear.bits, loss_nats=1e-5 * (1 + index), tried=index % 3 > 0,
        )
        for index, linear in enumerate(results)
    )  # fmt: skip


def answers(tag: str, count: int, drifted: int = 0) -> LanguageBehaviour:
    return LanguageBehaviour(
        language=tag, answers=count, identical=count // 3, exact_prefix_p50=21, tokens_original=40 * count,
        tokens_bundle=41 * count, ended_original=count // 2, ended_bundle=count // 2, loops_original=count // 8,
        loops_bundle=count // 6, drift_judged=count // 2, drifted=drifted,
    )  # fmt: skip


def change(tasks: int, lost: int, gained: int) -> Paired:
    mean = (gained - lost) / tasks
    return Paired(
        tasks=tasks, mean_difference=mean, standard_error=0.02, lost=lost, gained=gained, mcnemar_p=0.4,
        lower_bound=mean - 0.04, upper_bound=mean + 0.03, confidence=0.95, flips=("a", "b"),
    )  # fmt: skip


def behaviour() -> Behaviour:
    rows = tuple(answers(tag, 24, int(tag == "ar")) for tag, _, _ in LANGUAGES)
    count = 24 * len(rows)
    return Behaviour(
        passes=9,
        tokens_computed=40100,
        tokens_needed=36480,
        answers_recomputed=0,
        languages=rows,
        overall=answers("all", count, 1),
        ln_length_ratio=math.log(41 / 40),
        ln_length_ratio_error=0.01,
        loops=change(count, 12, 3),
        ended=change(count, 6, 6),
        drift=change(count // 2, 1, 0),
        tool_calls=change(30, 1, 0),
        tool_calls_together=change(30, 2, 0),
        translation=change(24, 9, 7),
        translations=(
            Translation(language="ar", sentences=3, chrf_original=0.51, chrf_bundle=0.49),
            Translation(language="sw", sentences=3, chrf_original=0.42, chrf_bundle=0.43),
        ),
        tasks=(
            TaskGroup(name=f"triage {ATTACK}", metric="choice", original=0.81, bundle=0.8, change=change(100, 3, 2)),
        ),
        concurrency=Concurrency(batch=4, prompts=count, identical=count - 30),
        differences=(
            Answer(
                id=f"triage:{ATTACK}", kind="task", language=None, prompt=f"Which ward? {ATTACK}", original="surgery",
                bundle="sur\u202eplus", exact_prefix=1, score_original=1, score_bundle=0,
            ),
            Answer(
                id="udhr/hi/3", kind="translate", language="hi", prompt="Everyone has rights.",
                original="हर किसी को अधिकार हैं", bundle="हर कोई अधिकार", exact_prefix=4, score_original=0.6,
                score_bundle=0.4,
            ),
        ),
    )  # fmt: skip


def make_report(layers: int = 40) -> Report:
    languages = tuple(language(*row) for row in LANGUAGES)
    checked = gates(languages)
    edges = (0.0, *(10 ** (-6 + index / 4) for index in range(29)))
    counts = tuple(round(9000 * math.exp(-(((index - 15) / 5.5) ** 2))) for index in range(len(edges) - 1))
    return Report(
        schema_version=1,
        glmexport_version="0.1.0",
        verdict=worst(gate.verdict for gate in checked),
        gates=checked,
        arithmetic=OriginalArithmetic(route=ATTACK, relative_error=1.3e-6, speed_ratio=2.09),
        policy=PolicySummary(
            source="target cpu-avx512vnni",
            gates=Gates(kl_mean_nats=0.05, ln_perplexity_ratio=0.03, top1_agreement=0.9, minimum_positions=500),
        ),
        subject=Subject(
            bundle="glm-4-9b-0414-int4-cpu",
            bundle_digest="sha256:" + "3f9c" * 16,
            target="cpu-avx512vnni",
            recipe="int4-gptq",
            family="glm4",
            checkpoint="zai-org/GLM-4-9B-0414",
            checkpoint_digest="sha256:" + "a17e" * 16,
            languages=tuple(row.language for row in languages),
        ),
        size=Size(
            parameters=9_400_279_040,
            original_bytes=18_800_558_080,
            bundle_bytes=6_241_812_480,
            weight_bytes=6_229_000_000,
            bits_per_weight=5.3,
            bits_per_weight_linears=4.63,
        ),
        fidelity=Fidelity(
            languages=languages,
            overall=language("all", 11.2, 0.0228, 55296),
            worst_language="ar",
            kl_histogram_edges_nats=edges,
            kl_histogram_counts=counts,
            worst_tokens=worst_tokens(),
            arithmetic="int4 weights, int8 activations (accuracy_level 4)",
            bands=(
                PositionBand(first=0, last=15, kl=estimate(0.011, "positive", 3456), top1_agreement=0.97),
                PositionBand(first=16, last=63, kl=estimate(0.023, "positive", 9000), top1_agreement=0.96),
            ),
            noise_floor=language("all", 11.2, 3e-12, 4096),
        ),
        prompts=PromptParity(
            compared=60,
            refused=3,
            differences=(
                PromptDifference(
                    conversation="several turns", language="ar", expected="<|assistant|>\n", given=f"<|user|>{ATTACK}"
                ),
            ),
        ),
        behaviour=behaviour(),
        shares=(
            Share(name="4-bit linears, fp32 arithmetic", kl_mean_nats=0.0171, note="the weights' own error"),
            Share(name="+ 8-bit lm_head and embeddings", kl_mean_nats=0.0009, note="round to nearest"),
            Share(name="+ int8 activations", kl_mean_nats=0.0046, note="the runtime's block-wise kernels"),
        ),
        performance=Performance(
            prompt_tokens=512,
            generated_tokens=128,
            rounds=8,
            original=Speed(
                runtime="transformers, bfloat16", threads=16, load_s=figure(21.4, 1), ttft_s=figure(5.61),
                prefill_tokens_per_s=figure(91.3), decode_tokens_per_s=figure(3.94),
                peak_memory_bytes=19_600_000_000, peak_memory_source="VmHWM",
                energy_j_per_token=None, energy_absent_because="The counters are for the administrator only.",
            ),
            original_absent_because=None,
            bundle=Speed(
                runtime="onnxruntime-genai", threads=16, load_s=figure(3.12, 1), ttft_s=figure(1.93),
                prefill_tokens_per_s=figure(265.0), decode_tokens_per_s=figure(11.4),
                peak_memory_bytes=6_900_000_000, peak_memory_source="VmHWM",
                energy_j_per_token=None, energy_absent_because="The counters are for the administrator only.",
            ),
            ratios=SpeedRatios(
                ttft_s=interval(1.93 / 5.61), prefill_tokens_per_s=interval(265.0 / 91.3),
                decode_tokens_per_s=interval(11.4 / 3.94), energy_j_per_token=None,
            ),
            placement=Placement(
                provider="CUDAExecutionProvider",
                operators=(
                    PlacedOperators(provider="CPUExecutionProvider", operator="Softmax", nodes=1),
                    PlacedOperators(provider="CPUExecutionProvider", operator="Gather", nodes=3),
                    PlacedOperators(provider="CUDAExecutionProvider", operator="MatMulNBits", nodes=161),
                ),
                on_purpose=("a (Gather)", "b (Gather)", "c (Gather)"),
                unexpected=(f"{ATTACK} (Softmax) on CPUExecutionProvider",),
            ),
            memory_bandwidth_bytes_per_s=92.4e9,
            bytes_read_per_token=5_610_000_000,
            roofline_decode_tokens_per_s=16.5,
        ),
        quantization=QuantizationSummary(
            linears=linears(layers), fallbacks=(), seconds=5820.0, peak_memory_bytes=11_300_000_000
        ),
        calibration=CalibrationSummary(
            tokens=524_288,
            sequences=256,
            tokens_per_language={tag: 524_288 // 16 * (8 if tag == "en" else 1) for tag, _, _ in LANGUAGES},
            digest="sha256:" + "77b0" * 16,
            overlap=Overlap(
                calibration_documents=731, evaluation_documents=216, shared_documents=0, shared_lines=0
            ),
        ),
        machine=Machine(
            system="Linux 6.8, glibc 2.39",
            processor="Intel Xeon Gold 6442Y",
            cores=24,
            memory_bytes=137_438_953_472,
            instruction_sets=("avx2", "avx512f", "avx512_vnni", "amx_int8"),
        ),
        versions={"torch": "2.13.0", "onnxruntime": "1.32.0", "glmexport": "0.1.0", "python": "3.11.9"},
        command="glmexport validate bundles/glm-4-9b-0414-int4-cpu --checkpoint zai-org/GLM-4-9B-0414",
        limits=(
            "Answers over many turns, tool calls and long contexts beyond 1024 tokens were not compared.",
            "Speeds are true of this machine with nothing else running on it.",
            "Whether the original itself is right, safe or fair is not asked here.",
        ),
    )  # fmt: skip


def with_devices(report: Report) -> Report:
    """The report as the worst of two of one class, beside an emulated device and one that did not answer."""

    def facts(processor: str, emulated: str | None = None) -> DeviceFacts:
        return DeviceFacts(
            system="Linux 6.1 aarch64",
            processor=processor,
            instruction_sets=("asimd", "asimddp"),
            cores=4,
            memory_bytes=8 << 30,
            runtime="onnxruntime 1.32.0",
            provider="CPUExecutionProvider",
            adapter=None,
            versions={"numpy": "2.4.6", ATTACK: ATTACK},
            emulated=emulated,
        )

    edge = DeviceResult(
        name="edge-1", device_class="arm-edge", verdict=report.verdict, failure=None, facts=facts("Cortex-A78"),
        fidelity=report.fidelity, behaviour=report.behaviour, performance=report.performance,
        performance_absent_because=None, gates=report.gates,
    )  # fmt: skip
    hot = {"performance": None, "performance_absent_because": "It was hot."}
    slower = edge.model_copy(update={"name": "edge-2", **hot})
    copied = edge.model_copy(
        update={
            "name": "qemu-arm64", "device_class": "qemu-arm64", "facts": facts("aarch64", "Emulated by QEMU."),
            "performance": None, "performance_absent_because": "Emulated by QEMU.",
        }
    )  # fmt: skip
    gone = DeviceResult(
        name=ATTACK, device_class="lost", verdict=Verdict.INCONCLUSIVE, failure=f"{ATTACK} burned down.", facts=None,
        fidelity=None, behaviour=None, performance=None, performance_absent_because=None, gates=(),
    )  # fmt: skip
    changes = {"devices": (edge, slower, copied, gone), "detailed": "edge-1"}
    return Report.model_validate({**dict(report), **changes})
