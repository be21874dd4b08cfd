"""``glmexport targets``: what is known, what this host is, and whether a bundle can run on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builds import Run, Sample, write_target

from glmexport.foundation.host import CPU_PROVIDER, Host
from glmexport.foundation.target import open_target, shipped_targets

AVX2 = Host("x86_64", frozenset({"avx2", "fma"}))


@pytest.fixture
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: AVX2))


def test_list(run: Run, on_avx2: None) -> None:
    document = run("targets", "list", "--json").document
    assert document["host"] == "x86-avx2"
    assert document["targets"] == [target.name for target in shipped_targets()]
    assert set(document["executed"]) == {t.name for t in shipped_targets() if t.provenance.executed}
    shown = run("targets", "list")
    assert shown.code == 0 and shown.stdout == ""
    row = next(line for line in shown.stderr.splitlines() if line.startswith("x86-avx2 "))
    assert "this host" in row and "yes" in row


def test_probe(run: Run, on_avx2: None) -> None:
    document = run("targets", "probe", "--json").document
    assert (document["host"], document["machine"], document["providers"]) == ("x86-avx2", "x86_64", [CPU_PROVIDER])
    assert document["lacking"]["x86-avx2"] == []
    assert any("CUDAExecutionProvider" in reason for reason in document["lacking"]["cuda"])
    shown = run("targets", "probe").stderr
    assert "This host is x86-avx2" in shown and "onnxruntime-gpu" in shown


@pytest.mark.parametrize("name", [target.name for target in shipped_targets()])
def test_show(run: Run, name: str) -> None:
    document = run("targets", "show", name, "--json").document
    assert document["name"] == name
    assert all(lowering["why"] and lowering["how"] for lowering in document["lowerings"])
    shown = run("targets", "show", name).stderr
    assert open_target(name).summary in shown and "graph.packed_qkv" in shown
    assert ("executed" in shown) and ("not yet possible" in shown) == bool(open_target(name).provenance.not_yet)


def test_show_tells_what_is_inherited_from_where(run: Run) -> None:
    extends = run("targets", "show", "x86-avx512-vnni", "--json").document["extends"]
    assert extends["target"] == "x86-avx2" and "graph.norm" in extends["claims"]
    assert "gates.kl_mean_nats" in extends["values"] and "probe.rank" not in extends["values"]
    shown = " ".join(run("targets", "show", "x86-avx512-vnni").stderr.split())
    assert "values from x86-avx2 provider.name" in shown and "reasons from x86-avx2 graph.contrib_operators" in shown
    assert run("targets", "show", "x86-avx2", "--json").document["extends"] is None
    assert " from x86-avx2" not in run("targets", "show", "x86-avx2").stderr
    assert run("targets", "show", "host", "--json").code == 0


def test_show_without_reasons(run: Run, tmp_path: Path) -> None:
    path = write_target(tmp_path, {"[provenance.claims]": "[provenance.claims]\n# none\n"}, "mine")
    text = path.read_text(encoding="utf-8").partition("[provenance.claims]")[0]
    path.write_text(text, encoding="utf-8")
    document = run("targets", "show", path, "--json").document
    assert {lowering["why"] for lowering in document["lowerings"]} == {None}
    assert "not stated" in run("targets", "show", path).stderr


def test_check(run: Run, sample: Sample, on_avx2: None) -> None:
    outcome = run("targets", "check", sample.bundle, "--json")
    assert outcome.code == 0 and outcome.document["runs"]
    assert "can run here" in run("targets", "check", sample.bundle).stderr


def test_check_says_why_not(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: Host("aarch64", frozenset({"asimddp"}))))
    outcome = run("targets", "check", sample.bundle, "--json")
    assert outcome.code == 1 and not outcome.document["runs"]
    details = " ".join(check["detail"] for check in outcome.document["checks"] if not check["holds"])
    assert "aarch64" in details and "avx2" in details
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: AVX2))
    monkeypatch.setattr("glmexport.bundle.fit.free_bytes", lambda: 1024)
    outcome = run("targets", "check", sample.bundle, "--json")
    assert outcome.code == 1
    assert [check["name"] for check in outcome.document["checks"] if not check["holds"]] == ["memory"]


def test_check_of_what_is_no_bundle(run: Run, tmp_path: Path) -> None:
    outcome = run("targets", "check", tmp_path)
    assert outcome.code == 64 and "is not a bundle" in outcome.stderr


def test_the_manifest_carries_the_reasons(sample: Sample) -> None:
    target = json.loads((sample.bundle / "bundle.json").read_text(encoding="utf-8"))["target"]
    assert target["provenance"]["claims"]["graph.packed_qkv"]["why"]
