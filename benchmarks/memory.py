"""Peak resident memory of a build: it must not grow with the number of layers, and a 32B block must fit 8 GiB.

    python -m benchmarks.memory [layers] [block-32b] [experts] [block-glm-5.2] [--output FILE]

``layers`` quantizes and writes synthetic checkpoints of one width with 8 and 32 layers and compares the peaks.
``block-32b`` does the same with one decoder block of the dense 32B shape (hidden 6144, ffn 23040, 48 heads / 8 KV)
under --max-memory 8GiB. ``experts`` compares one layer of 8 experts with one of 32, of 2,048 x 1,024.
``block-glm-5.2`` is one layer of GLM-5.2: latent attention, indexer, and 256 experts of 6,144 x 2,048, 8 a token, under
--max-memory 16GiB; it needs 45 GB of disk and an hour and a half on two cores.
Each runs in a process of its own, whose peak is what the kernel recorded (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.synthetic import write_synthetic
from glmexport.foundation import machine

WIDTH = {
    # A layer is 4 M weights: if each left its fp32 weights behind, 24 more layers would add 400 MB.
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
DENSE_32B = {
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
MIXTURE = {
    "model_type": "glm4_moe",
    "hidden_size": 2048,
    "intermediate_size": 2048,
    # Of 6 M weights each: were they kept in fp32, 24 more would add 600 MB.
    "moe_intermediate_size": 1024,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
#: One of the 75 layers with experts of the published GLM-5.2; the other three are dense.
GLM_5_2_BLOCK = {
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_hidden_layers": 1,
    "mlp_layer_types": ["sparse"],
    "indexer_types": ["full"],
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
GLM_5_2_LAYERS, GLM_5_2_DENSE = 78, 3
GIB = 2**30


def child(checkpoint: Path, tokens: int, threads: int, limit: int) -> None:
    """Quantize and write ``checkpoint``; print peak memory and seconds."""
    import torch

    from glmexport.assembly.write import BundleContents, write_bundle
    from glmexport.calibration.corpus import shipped_documents
    from glmexport.calibration.sequences import pack
    from glmexport.cli.console import Terminal
    from glmexport.foundation.recipe import open_recipe
    from glmexport.foundation.target import HOST, open_target
    from glmexport.quantization.job import QuantizationJob
    from glmexport.quantization.memory import plan_memory
    from glmexport.quantization.store import WorkDirectory
    from glmexport.quantization.walk import walk
    from glmexport.reference.reference import Reference
    from glmexport.workflows.original import Original
    from glmexport.workflows.provenance import calibration_source, source_of

    torch.set_num_threads(threads)
    terminal = Terminal()
    original = Original.open(str(checkpoint), terminal)
    recipe = open_recipe("w4g128")
    assert recipe.calibration is not None
    plan = recipe.calibration.model_copy(update={"tokens": tokens})
    documents = shipped_documents("calibration")
    calibration = pack(documents, original.tokenizer, plan, original.architecture.context_length)
    memory = plan_memory(original.architecture, recipe, limit)
    started, processed = time.monotonic(), time.process_time()
    work = WorkDirectory.for_job(checkpoint.parent, {"checkpoint": checkpoint.name})
    model = walk(
        QuantizationJob(original.checkpoint, original.architecture, recipe, calibration, work, memory, terminal)
    )
    walked = machine.peak_memory()
    seconds, processor = time.monotonic() - started, time.process_time() - processed
    reference = Reference(original.checkpoint, original.architecture)
    contents = BundleContents(
        architecture=original.architecture,
        weights=model.weights(),
        rotary_tables=reference.rotary_tables(original.architecture.context_length),
        recipe=recipe,
        target=open_target(HOST),
        source=source_of(original, terminal),
        calibration=calibration_source(calibration, documents),
        records=model.records,
        tokenizer_files=original.tokenizer.files,
    )
    write_bundle(checkpoint.parent / f"{checkpoint.name}-bundle", contents, terminal)
    figures = {
        "quantize_seconds": seconds,
        "quantize_processor_seconds": processor,
        "peak_bytes": walked,
        "peak_bytes_after_writing": machine.peak_memory(),
        "planned_bytes": memory.peak_bytes,
        "calibration_tokens": calibration.tokens,
        "fallbacks": sum(record.fallback is not None for record in model.records),
    }
    print(json.dumps(figures))


def measured(config: dict[str, Any], tokens: int, threads: int, limit: int) -> dict[str, Any]:
    """The figures of one synthetic checkpoint, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_synthetic(checkpoint, config)
        arguments = [str(checkpoint), str(tokens), str(threads), str(limit)]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--child", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return {"config": config, **json.loads(process.stdout.splitlines()[-1])}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        path, tokens, threads, limit = sys.argv[2:]
        child(Path(path), int(tokens), int(threads), int(limit))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["layers", "block-32b"])
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {
        "command": "python -m benchmarks.memory " + " ".join(options.parts),
        "processor": machine.processor_name(),
        "threads": options.threads,
        "versions": machine.library_versions(),
    }
    if "layers" in options.parts:
        runs = [measured(WIDTH | {"num_hidden_layers": count}, 4096, options.threads, 4 * GIB) for count in (8, 32)]
        growth = runs[1]["peak_bytes_after_writing"] / runs[0]["peak_bytes_after_writing"] - 1
        document["layers"] = {"runs": runs, "growth": growth}
        for run in runs:
            count, peak = run["config"]["num_hidden_layers"], run["peak_bytes_after_writing"] / GIB
            print(f"{count:3} layers: peak {peak:.3f} GiB, {run['quantize_seconds'] / count:.1f} s a layer")
        print(f"32 layers against 8: {growth:+.1%} (at most +5 %)")
    if "block-32b" in options.parts:
        run = measured(DENSE_32B, 4096, options.threads, 8 * GIB)
        document["block_32b"] = run
        print(
            f"dense 32B block: peak {run['peak_bytes'] / GIB:.2f} GiB (planned {run['planned_bytes'] / GIB:.2f}, "
            f"at most 8), {run['quantize_seconds']:.0f} s with {run['calibration_tokens']} tokens"
        )
    if "experts" in options.parts:
        runs = [measured(MIXTURE | {"n_routed_experts": count}, 4096, options.threads, 16 * GIB) for count in (8, 32)]
        growth = runs[1]["peak_bytes_after_writing"] / runs[0]["peak_bytes_after_writing"] - 1
        document["experts"] = {"runs": runs, "growth": growth}
        for run in runs:
            count, peak = run["config"]["n_routed_experts"], run["peak_bytes_after_writing"] / GIB
            print(f"{count:3} experts: peak {peak:.3f} GiB (planned {run['planned_bytes'] / GIB:.2f})")
        print(f"32 experts against 8: {growth:+.1%}")
    if "block-glm-5.2" in options.parts:
        run = measured(GLM_5_2_BLOCK, 4096, options.threads, 16 * GIB)
        document["block_glm_5_2"] = run
        sparse = GLM_5_2_LAYERS - GLM_5_2_DENSE
        wall, processor = run["quantize_seconds"], run["quantize_processor_seconds"]
        print(
            f"block of GLM-5.2: peak {run['peak_bytes'] / GIB:.2f} GiB (planned {run['planned_bytes'] / GIB:.2f}, at "
            f"most 16); {wall:.0f} s, {processor:.0f} processor seconds, {run['calibration_tokens']} tokens; its "
            f"{sparse} layers of {GLM_5_2_LAYERS}: {wall * sparse / 3600:.0f} and {processor * sparse / 3600:.0f} hours"
        )
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
