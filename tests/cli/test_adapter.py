"""Fine-tunes: the bundle of a checkpoint with an adapter is that of the merged model, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import CONFIG, PREFIX, WEIGHTS, factors, write_adapter
from builds import TARGET, THREADS, Outcome, Run, digests, session, small_checkpoint
from safetensors.torch import load_file, save_file

from glmexport.bundle.manifest import read_manifest
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_INPUT
from glmexport.report.document import read_report

QUERY = "model.layers.0.self_attn.q_proj"
UPDATED = (QUERY, "model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head")
ARGUMENTS = ("--target", TARGET, "--threads", THREADS)


@dataclass(frozen=True)
class Tuned:
    """A checkpoint, an adapter of it, the merged model, and the bundle of the two in fp32."""

    checkpoint: Path
    adapter: Path
    model: Any
    bundle: Path
    outcome: Outcome


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """transformers' model of the checkpoint ``base``, in fp32."""
    return small_checkpoint(tmp_path / "base")


def tune(model: Any, directory: Path) -> Path:
    """Write an adapter that changes the model by much, and merge it into ``model`` as the paper says."""
    torch.manual_seed(3)
    weights, tensors = model.state_dict(), {}
    for module in UPDATED:
        update = {name: tensor / 8 for name, tensor in factors(module, *weights[f"{module}.weight"].shape).items()}
        tensors |= update
        a, b = update.values()
        delta = b @ a
        weights[f"{module}.weight"] += 2.0 * (delta.T if module == "model.embed_tokens" else delta)
    tensors[f"{PREFIX}{QUERY}.base_layer.bias"] = torch.randn_like(weights[f"{QUERY}.bias"])
    tensors[f"{PREFIX}model.norm.weight"] = torch.rand_like(weights["model.norm.weight"]) + 0.5
    weights[f"{QUERY}.bias"].copy_(tensors[f"{PREFIX}{QUERY}.base_layer.bias"])
    weights["model.norm.weight"].copy_(tensors[f"{PREFIX}model.norm.weight"])
    return write_adapter(
        directory, tensors, bias="lora_only", modules_to_save=["model.norm"], base_model_name_or_path="acme/base"
    )


@pytest.fixture
def tuned(base: Any, tmp_path: Path, run: Run) -> Tuned:
    with torch.no_grad():
        adapter = tune(base, tmp_path / "legal")
    bundle = tmp_path / "bundle"
    outcome = run("build", tmp_path / "base", "--adapter", adapter, "--recipe", "fp32", *ARGUMENTS, "-o", bundle)
    assert outcome.code == EXIT_INCONCLUSIVE, outcome.stderr
    return Tuned(tmp_path / "base", adapter, base, bundle, outcome)


def logits(bundle: Path, ids: np.ndarray) -> np.ndarray:
    runtime = session(bundle, "scoring.onnx")
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, np.int64)}
    for value in runtime.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return np.asarray(runtime.run(None, feeds)[0])


def test_the_bundle_is_that_of_the_merged_model(tuned: Tuned, tmp_path: Path, run: Run) -> None:
    ids = np.random.default_rng(6).integers(0, 250, (1, 40))
    with torch.inference_mode():
        expected = tuned.model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits(tuned.bundle, ids) - expected).max() <= 1e-4

    # The reference of the validation was the merged model too.
    report = read_report(tuned.bundle / "report.json")
    assert report.fidelity.overall.kl_mean_nats < 1e-6
    assert report.fidelity.overall.top1_agreement == 1

    # What it was made of is in the lines, the manifest and both reports.
    opened = Checkpoint.open(tuned.checkpoint, adapter=tuned.adapter)
    source = read_manifest(tuned.bundle).source
    assert opened.adapter is not None and source.adapter is not None
    assert (source.name, source.digest) == ("base", opened.digest())
    assert (source.adapter.name, source.adapter.digest) == ("legal", opened.adapter.digest())
    assert (report.subject.adapter, report.subject.adapter_digest) == ("legal", opened.adapter.digest())
    html = (tuned.bundle / "report.html").read_text(encoding="utf-8")
    assert "with the adapter" in html and ">legal<" in html and opened.adapter.digest() in html
    assert "legal" in tuned.outcome.stderr and "LoRA of rank 4; updated matrices: 5" in tuned.outcome.stderr

    # Validated again, only the same adapter will do.
    before = digests(tuned.bundle)
    against = ("validate", tuned.bundle, "--against", tuned.checkpoint, "--threads", THREADS)
    again = run(*against, "--adapter", tuned.adapter, "--json")
    assert again.code == EXIT_INCONCLUSIVE, again.stderr
    assert again.document["fidelity"]["overall"]["kl_mean_nats"] < 1e-6
    assert again.document["subject"]["adapter"] == "legal"
    alone = run(*against)
    assert alone.code == EXIT_INPUT and "Traceback" not in alone.stderr
    assert "built from base with the adapter legal" in alone.stderr and "its adapter with --adapter" in alone.stderr
    other = json.loads((tuned.adapter / CONFIG).read_text(encoding="utf-8")) | {"lora_alpha": 9}
    (tuned.adapter / CONFIG).write_text(json.dumps(other), encoding="utf-8")
    assert run(*against, "--adapter", tuned.adapter).code == EXIT_INPUT
    assert digests(tuned.bundle) == before


def test_quantized_by_rows_it_is_what_the_merged_checkpoint_gives(base: Any, tmp_path: Path, run: Run) -> None:
    with torch.no_grad():
        adapter = tune(base, tmp_path / "legal")
    opened = Checkpoint.open(tmp_path / "base", adapter=adapter)
    merged = tmp_path / "merged"
    merged.mkdir()
    for path in (tmp_path / "base").iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    save_file({name: opened.read(name) for name in opened.tensors}, merged / "model.safetensors")
    bundles = []
    for checkpoint, more in ((tmp_path / "base", ("--adapter", adapter)), (merged, ())):
        bundles.append(tmp_path / f"bundle-of-{checkpoint.name}")
        outcome = run("build", checkpoint, *more, "--recipe", "rtn-w4g32", *ARGUMENTS, "-o", bundles[-1])
        assert outcome.code in (1, EXIT_INCONCLUSIVE), outcome.stderr
    one, other = (digests(bundle) for bundle in bundles)
    assert {name for name in one if one[name] != other[name]} == {"bundle.json"}


def test_where_the_bundle_goes_and_what_inspect_tells(
    base: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        tune(base, tmp_path / "legal")
    document = run("inspect", "base", "--adapter", "legal", "--json").document
    assert document["adapter"]["name"] == "legal"
    assert document["adapter"]["updates"]["lm_head.weight"] == {"rank": 4, "scale": 2.0, "dora": False}
    assert document["adapter"]["replaced"] == ["model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
    assert run("inspect", "base", "--json").document["adapter"] is None
    assert run("build", "base", "--adapter", "legal", "--recipe", "fp32", *ARGUMENTS).code == EXIT_INCONCLUSIVE
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [f"base-legal-fp32-{TARGET}"]


def edit(**settings: Any) -> Callable[[Path], object]:
    def change(adapter: Path) -> None:
        path = adapter / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")

    return change


def exchange(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return apply


FIRST = f"{PREFIX}{QUERY}.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no configuration": (lambda adapter: (adapter / CONFIG).unlink(), ("no adapter", CONFIG, "save_pretrained")),
    "a pickle": (lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"), ("adapter_model.bin",)),
    "another kind": (edit(peft_type="LOHA"), (CONFIG, "LOHA", "merge_and_unload")),
    "an unknown tensor": (
        exchange(lambda tensors: tensors.update({f"{PREFIX}score.weight": torch.ones(2)})),
        ("score.weight", "no place"),
    ),
    "a wrong shape": (
        exchange(lambda tensors: tensors.update({FIRST: torch.ones(4, 64)})),
        (FIRST, "[4, 64]", "[4, 128]"),
    ),
    "not a number": (exchange(lambda tensors: tensors[FIRST].fill_(float("nan"))), (FIRST, "not finite", "[0, 0]")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_adapter_that_cannot_be_used(name: str, base: Any, tmp_path: Path, run: Run) -> None:
    damage, words = DAMAGE[name]
    with torch.no_grad():
        adapter = tune(base, tmp_path / "legal")
    damage(adapter)
    output = tmp_path / "place" / "bundle"
    outcome = run("build", tmp_path / "base", "--adapter", adapter, "--recipe", "rtn-w4g32", *ARGUMENTS, "-o", output)
    assert outcome.code == EXIT_INPUT and outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    said = outcome.stderr[outcome.stderr.index("ERROR ") :]
    assert all(word in said for word in (str(adapter), *words))
    assert not output.exists()
