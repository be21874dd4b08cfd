"""Recipes and targets: the shipped ones are sound, and a wrong one is refused by file, key and nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from glmexport.foundation.definition import names
from glmexport.foundation.errors import DefinitionError
from glmexport.foundation.host import CPU_PROVIDER, Gpu, Host, gpus_in
from glmexport.foundation.recipe import RECIPES, CalibrationPlan, Format, Recipe, Solver, open_recipe
from glmexport.foundation.resources import shipped
from glmexport.foundation.target import HOST, TARGETS, Limits, host_target, open_policy, open_target, shipped_targets
from glmexport.lowering.explain import lowerings

AVX2 = ["fpu", "sse4_2", "avx2", "fma", "f16c"]
VNNI = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512_vnni"]
RECIPE = """
summary = "mine"

[linears]
bits = 4
group_size = 32

[calibration]
tokens = 4096
sequence_length = 512
quota = { zh = 1, en = 1 }
"""


def write(tmp_path: Path, text: str, name: str = "mine.toml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", names(RECIPES))
def test_every_shipped_recipe_opens(name: str) -> None:
    recipe = open_recipe(name)
    assert recipe.name == name and recipe.summary
    assert recipe.needs_calibration == (recipe.calibration is not None)
    if recipe.linears is not None:
        assert recipe.budget is not None or recipe.linears.label in name
    if recipe.needs_calibration and recipe.calibration is not None:
        assert "user" in recipe.calibration.quota


@pytest.mark.parametrize("name", names(TARGETS))
def test_every_shipped_target_opens(name: str) -> None:
    target = open_target(name)
    assert target.name == name and target.summary and target.provenance.measured_on
    default = open_recipe(target.weights.default_recipe)
    for form in (default.linears, default.lm_head, default.embedding):
        assert form is not None
        assert form.bits in target.weights.bits and form.group_size in target.weights.group_sizes
    assert target.can("com.microsoft::MatMulNBits") == (target.weights.form == "MatMulNBits")
    assert not target.can("com.microsoft::Unheard")
    assert target in shipped_targets()


@pytest.mark.parametrize("name", names(TARGETS))
def test_every_shipped_target_gives_its_reasons(name: str) -> None:
    target = open_target(name)
    decisions = lowerings(target)
    assert all(lowering.claim is not None for lowering in decisions), decisions
    assert all(target.value(lowering.key) is not None for lowering in decisions)
    if not target.provenance.executed:
        # What nobody ran on such hardware, nobody can have measured there.
        assert {claim.how for claim in target.provenance.claims.values()} <= {"read", "chosen", "executed"}
        assert target.provenance.not_yet


def test_what_is_shipped() -> None:
    assert {"w4g32", "w4g128", "w4g32-sym", "rtn-w4g32", "fp32"} <= set(names(RECIPES))
    assert set(names(TARGETS)) == {
        "x86-avx2", "x86-avx512-vnni", "arm64", "cuda", "trt-rtx", "openvino", "directml", "webgpu", "wasm", "qnn",
    }  # fmt: skip
    assert {target.name for target in shipped_targets() if target.provenance.executed} >= {
        "x86-avx2",
        "x86-avx512-vnni",
    }


def test_an_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(DefinitionError, match=r"There is no target named 'x86-avx22'\.") as refused:
        open_target("x86-avx22")
    assert "Did you mean 'x86-avx2'?" in refused.value.next_step
    assert "x86-avx512-vnni" in refused.value.next_step


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(DefinitionError, match="There is no recipe named 'w4g23'") as refused:
        open_recipe("w4g23")
    assert "Did you mean 'w4g32'?" in refused.value.next_step


def test_a_name_like_no_other_suggests_nothing() -> None:
    with pytest.raises(DefinitionError) as refused:
        open_recipe("zzzzzzzz")
    assert "Did you mean" not in refused.value.next_step and "w4g32" in refused.value.next_step


@pytest.mark.parametrize("name", ["", ".", "../recipes/w4g32", "recipes/w4g32", "w4g32/", "../../targets/x86-avx2"])
def test_a_name_is_not_a_path(name: str) -> None:
    with pytest.raises(DefinitionError):
        open_recipe(name)


def test_a_file_of_the_user_s(tmp_path: Path) -> None:
    recipe = open_recipe(write(tmp_path, RECIPE))
    assert (recipe.name, recipe.summary) == ("mine", "mine")
    assert recipe.linears == Format(bits=4, group_size=32)
    assert recipe.lm_head is None and recipe.solver == Solver()
    target = shipped(TARGETS) / "x86-avx2.toml"
    assert open_target(write(tmp_path, target.read_text(encoding="utf-8"), "edge.toml")).name == "edge"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"There is no recipe file .*nowhere\.toml") as refused:
        open_recipe(str(tmp_path / "nowhere.toml"))
    assert "w4g32" in refused.value.next_step


@pytest.mark.parametrize(
    "line,key",
    [
        ("colour = 1", "colour"),
        ("linears.bitz = 4", "linears.bitz"),
        ("linears.bits = 3", "linears.bits"),
        ("linears.group_size = 48", "linears.group_size"),
        ("solver.damping = 0", "solver.damping"),
        ("solver.order = 'random'", "solver.order"),
        ("solver.polish_rounds = -1", "solver.polish_rounds"),
        ("calibration.tokens = 10", "calibration.tokens"),
        ("calibration.quota.zh = 0", "calibration.quota"),
        ("calibration.quota.zh = 'much'", "calibration.quota.zh"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, line: str, key: str) -> None:
    *path, last = line.partition(" =")[0].split(".")
    table: dict[str, dict[str, str]] = {
        "linears": {"bits": "4", "group_size": "32"},
        "calibration": {"tokens": "4096", "sequence_length": "512", "quota.zh": "1"},
    }
    value = line.partition("= ")[2]
    lines = [f"{line}"] if not path else []
    for name in dict.fromkeys([*table, *path[:1]]):
        fields = dict(table.get(name, {}))
        if path and path[0] == name:
            fields[".".join([*path[1:], last])] = value
        lines += [f"[{name}]", *(f"{field} = {content}" for field, content in fields.items())]
    text = 'summary = "x"\n' + "\n".join(lines)
    with pytest.raises(DefinitionError) as refused:
        open_recipe(write(tmp_path, text))
    assert f"mine.toml: {key}: " in refused.value.message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"mine\.toml: linears\.group_size: Field required"):
        open_recipe(write(tmp_path, RECIPE.replace("group_size = 32", "")))


def test_a_policy(tmp_path: Path) -> None:
    limits = "kl_mean_nats = 0.02\nln_perplexity_ratio = 0.01\ntop1_agreement = 0.95\nminimum_positions = 1000\n"
    own = "confidence = 0.99\n[languages.zh]\nkl_mean_nats = 0.01\n"
    policy = open_policy(Path(write(tmp_path, limits + own, "x.toml")))
    assert policy.source == "x.toml" and policy.gates.confidence == 0.99 and policy.gates.warn_at == 0.75
    assert policy.gates.limits("zh") == Limits(kl_mean_nats=0.01, ln_perplexity_ratio=0.01, top1_agreement=0.95)
    assert policy.gates.limits("en").kl_mean_nats == 0.02
    with pytest.raises(DefinitionError, match="no policy file"):
        open_policy(tmp_path / "y.toml")
    for wrong in ("confidence = 1.0", "top1 = 0.9", "[languages.zh]\nkl = 0.1", "warn_at = 0"):
        with pytest.raises(DefinitionError, match=r"x\.toml"):
            open_policy(Path(write(tmp_path, f"{limits}{wrong}\n", "x.toml")))


def test_an_unknown_key_of_a_target_is_named(tmp_path: Path) -> None:
    text = (shipped(TARGETS) / "x86-avx2.toml").read_text(encoding="utf-8")
    with pytest.raises(DefinitionError, match=r"edge\.toml: graph\.opsets: Extra inputs are not permitted"):
        open_target(write(tmp_path, text.replace("opset =", "opsets = 1\nopset ="), "edge.toml"))


@pytest.mark.parametrize("content", [b"= 3", b"[linears", b"summary = 'x'\nsummary = 'y'", b"\xff\xfe"])
def test_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(DefinitionError, match=r"mine\.toml is not TOML: "):
        open_recipe(str(path))


def test_a_solver_without_text_is_refused(tmp_path: Path) -> None:
    """It would quietly round to nearest."""
    with pytest.raises(DefinitionError, match=r"mine\.toml: .*needs a \[calibration\] table"):
        open_recipe(write(tmp_path, RECIPE.partition("[calibration]")[0]))


def test_text_without_a_solver_is_refused(tmp_path: Path) -> None:
    """It would quietly be ignored, or quietly solve."""
    with pytest.raises(DefinitionError, match=r"mine\.toml: .*\[calibration\] is given, but nothing is solved"):
        open_recipe(write(tmp_path, RECIPE + '\n[solver]\nmethod = "round-to-nearest"\n'))


def test_a_reason_for_a_key_that_there_is_not(tmp_path: Path) -> None:
    text = (shipped(TARGETS) / "x86-avx2.toml").read_text(encoding="utf-8")
    with pytest.raises(DefinitionError, match=r"edge\.toml: .*no key 'graph\.opsets'"):
        open_target(write(tmp_path, text.replace('"graph.opset"', '"graph.opsets"'), "edge.toml"))


@pytest.mark.parametrize("machine", ["x86_64", "amd64"])
@pytest.mark.parametrize(
    "flags,name", [(AVX2, "x86-avx2"), (VNNI, "x86-avx512-vnni"), ([*AVX2, "avx512f", "avx512_vnni"], "x86-avx2")]
)
def test_a_host_is_recognised_by_its_flags(machine: str, flags: list[str], name: str) -> None:
    assert host_target(Host(machine, frozenset(flags))).name == name


@pytest.mark.parametrize(
    "machine,flags,provider,gpu,name",
    [
        ("aarch64", ["asimd", "asimddp"], None, None, "arm64"),
        ("arm64", ["asimddp", "i8mm"], None, None, "arm64"),
        # A provider without its hardware, and hardware without its provider.
        ("x86_64", VNNI, "CUDAExecutionProvider", None, "x86-avx512-vnni"),
        ("x86_64", VNNI, "CUDAExecutionProvider", 7.5, "x86-avx512-vnni"),
        ("x86_64", VNNI, None, 9.0, "x86-avx512-vnni"),
        ("x86_64", VNNI, "CUDAExecutionProvider", 8.0, "cuda"),
        ("aarch64", ["asimddp"], "CUDAExecutionProvider", 9.0, "cuda"),
        ("x86_64", AVX2, "NvTensorRTRTXExecutionProvider", 12.0, "trt-rtx"),
        ("amd64", AVX2, "DmlExecutionProvider", None, "directml"),
        ("arm64", ["asimddp"], "QNNExecutionProvider", None, "qnn"),
        # Slower than ONNX Runtime's own kernels, so only where somebody asks for it.
        ("x86_64", VNNI, "OpenVINOExecutionProvider", None, "x86-avx512-vnni"),
    ],
)
def test_an_accelerator_is_recognised_by_provider_and_hardware(
    machine: str, flags: list[str], provider: str | None, gpu: float | None, name: str
) -> None:
    providers = (provider, CPU_PROVIDER) if provider else (CPU_PROVIDER,)
    gpus = (Gpu("GPU", gpu, 1 << 34),) if gpu else ()
    assert host_target(Host(machine, frozenset(flags), providers, gpus)).name == name


def test_what_a_host_lacks_is_said() -> None:
    host = Host("x86_64", frozenset(AVX2))
    assert open_target("x86-avx2").lacking(host) == []
    assert open_target("x86-avx512-vnni").lacking(host) == [
        "The processor has no avx512f, avx512bw, avx512vl, avx512_vnni."
    ]
    provider, gpu = open_target("cuda").lacking(host)
    assert "CUDAExecutionProvider" in provider and "onnxruntime-gpu" in provider and "nvidia-smi" in gpu
    (old,) = open_target("cuda").lacking(
        Host("x86_64", frozenset(AVX2), ("CUDAExecutionProvider",), (Gpu("T4", 7.5, 1 << 34),))
    )
    assert "7.5" in old and "8.0" in old
    (browser,) = open_target("wasm").lacking(host)
    assert "browser" in browser


def test_gpus_as_nvidia_smi_lists_them() -> None:
    listing = "NVIDIA H100 80GB HBM3, 9.0, 81559\nNVIDIA GeForce RTX 4090, 8.9, 24564\nNo devices were found\n, ,\n"
    first, second = gpus_in(listing)
    assert first == Gpu("NVIDIA H100 80GB HBM3", 9.0, 81559 << 20)
    assert second.compute_capability == 8.9
    assert gpus_in("") == ()
    assert Host("x86_64", gpus=(second, first)).compute_capability == 9.0


@pytest.mark.parametrize("machine,flags", [("vax", VNNI), ("x86_64", ["fpu"]), ("x86_64", []), ("s390x", [])])
def test_an_unknown_host_is_refused(machine: str, flags: list[str]) -> None:
    with pytest.raises(DefinitionError, match=rf"No shipped target matches this host \({machine}\)") as refused:
        host_target(Host(machine, frozenset(flags)))
    assert "--target" in refused.value.next_step


def test_host_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmexport.foundation.host.platform.machine", lambda: "AMD64")
    monkeypatch.setattr("glmexport.foundation.host.cpu_flags", lambda: frozenset(VNNI))
    assert open_target(HOST).name == "x86-avx512-vnni"
    monkeypatch.setattr("glmexport.foundation.host.providers", lambda: ("CUDAExecutionProvider", CPU_PROVIDER))
    monkeypatch.setattr("glmexport.foundation.host.gpus", lambda: (Gpu("GPU", 9.0, 1 << 36),))
    assert open_target(HOST).name == "cuda"


def recipe(**changes: object) -> Recipe:
    values: dict[str, object] = {
        "name": "mine",
        "summary": "one",
        "linears": Format(bits=4, group_size=32),
        "calibration": CalibrationPlan(tokens=4096, sequence_length=512, quota={"zh": 1.0}),
    }
    return Recipe.model_validate(values | changes)


def test_the_digest_of_a_recipe_ignores_its_summary() -> None:
    assert recipe().digest() == recipe(summary="another").digest() == recipe(solver=Solver()).digest()
    assert recipe().digest().startswith("sha256:")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "yours"},
        {"linears": Format(bits=8, group_size=32)},
        {"linears": Format(bits=4, group_size=64)},
        {"linears": Format(bits=4, group_size=32, symmetric=True)},
        {"lm_head": Format(bits=8, group_size=32)},
        {"embedding": Format(bits=8, group_size=32)},
        {"solver": Solver(damping=0.02)},
        {"solver": Solver(order="stored")},
        {"solver": Solver(scale_search=False)},
        {"solver": Solver(polish_rounds=1)},
        {"calibration": CalibrationPlan(tokens=4097, sequence_length=512, quota={"zh": 1.0})},
        {"calibration": CalibrationPlan(tokens=4096, sequence_length=256, quota={"zh": 1.0})},
        {"calibration": CalibrationPlan(tokens=4096, sequence_length=512, quota={"zh": 1.0, "en": 1.0})},
    ],
    ids=str,
)
def test_the_digest_of_a_recipe_has_everything_else(changes: dict[str, object]) -> None:
    assert recipe(**changes).digest() != recipe().digest()


def test_definitions_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        open_recipe("w4g32").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "form,label",
    [
        (Format(bits=4, group_size=32), "w4g32"),
        (Format(bits=4, group_size=128, symmetric=True), "w4g128-sym"),
        (Format(bits=8, group_size=16), "w8g16"),
    ],
)
def test_labels(form: Format, label: str) -> None:
    assert form.label == label
