"""What a quantized cache costs: the demo with caches of int8 and int4 against the same with a cache of floats.

    python -m benchmarks.cache [--positions N] [--output FILE]

Weights are fp32 on both sides, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from glmexport.assembly.cache_scales import calibrate_caches, set_scales
from glmexport.assembly.external import write_graphs
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS
from glmexport.calibration.corpus import USER, evaluation_documents, shipped_documents
from glmexport.calibration.sequences import pack
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.demo import demo_checkpoint
from glmexport.engine.core.cache import cache_specs
from glmexport.foundation import machine
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.foundation.target import open_target
from glmexport.graph.build import build_graph
from glmexport.lowering.pipeline import lower
from glmexport.quantization.weights import Weights
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.texts import EvaluationText, evaluation_texts
from glmexport.workflows.calibration_text import cache_text

FORMS = (("activations", "channel"), ("int8", "channel"), ("int8", "tensor"), ("int4", "channel"), ("int4", "tensor"))
GRAPH = "scoring.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=120, help="in each language, in texts of at most 128 tokens")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    path = demo_checkpoint()
    checkpoint, tokenizer = Checkpoint.open(path), Tokenizer.open(path)
    architecture = describe(checkpoint)
    weights = Weights(checkpoint, architecture, None, [])
    tables = Reference(checkpoint, architecture).rotary_tables(architecture.context_length)
    plan = open_recipe("w4g32").calibration
    assert plan is not None
    documents = shipped_documents("calibration", set(plan.quota) - {USER})
    text = cache_text(pack(documents, tokenizer, plan, architecture.context_length))
    texts = evaluation_texts(
        evaluation_documents((), tokenizer, ()), tokenizer, positions_per_language=arguments.positions, longest=128
    )
    rows: list[dict[str, Any]] = []
    reference: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for cache, scales in FORMS:
            target = open_target("x86-avx2")
            graph = target.graph.model_copy(update={"kv_cache": cache, "kv_scales": scales})
            target = target.model_copy(update={"graph": graph})
            model = lower(build_graph(architecture, graph, every_position=True), target, weights, tables)
            out = Path(folder) / f"{cache}-{scales}"
            write_graphs({GRAPH: model}, out, Silent())
            if cache != "activations":
                floats = Path(folder) / "activations-channel" / GRAPH
                set_scales(model, calibrate_caches(floats, architecture, graph, text, Silent()))
                ir.save(model, out / GRAPH)
            found = logits(out / GRAPH, texts)
            if cache == "activations":
                reference = found
                continue
            row = {"cache": cache, "scale for each": scales, **divergence(reference, found)}
            print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
            rows.append(row)
    result = {
        "positions": sum(len(each) for each in reference),
        "calibration_tokens": sum(map(len, text)),
        "processor": machine.processor_name(),
        "versions": machine.library_versions(),
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def logits(path: Path, texts: list[EvaluationText]) -> list[Tensor]:
    """Of every text [positions, vocabulary], each from an empty cache."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for text in texts:
        given = {INPUT_IDS: text.ids[None].numpy(), ATTENTION_MASK: np.ones((1, len(text.ids)), np.int64)}
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        past = {entry.name: "" for entry in session.get_inputs() if entry.name not in given}
        feeds |= {spec.input: spec.empty(1, 0) for spec in cache_specs(session, past)}
        (rows,) = session.run_with_ort_values([LOGITS], feeds)
        found.append(torch.from_numpy(rows.numpy()[0, text.prefix - 1 : -1].copy()))
    return found


def divergence(reference: list[Tensor], found: list[Tensor]) -> dict[str, float]:
    """Mean and 99th percentile of KL(floats || codes) in nats, and the share of the same most likely token."""
    parts, same = [], []
    for before, after in zip(reference, found, strict=True):
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
        same.append((before.argmax(-1) == after.argmax(-1)).double())
    kl = torch.cat(parts)
    return {
        "kl_mean_nats": float(kl.mean()),
        "kl_p99_nats": float(kl.quantile(0.99)),
        "top1_agreement": float(torch.cat(same).mean()),
    }


if __name__ == "__main__":
    main()
