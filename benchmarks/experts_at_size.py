"""GLM-4.7-Flash's shape (30B-A3B): its experts quantized by GPTQ, and the whole model rounded, written and asked.

    python -m benchmarks.experts_at_size FOLDER [gptq] [nearest] [--layers N] [--tokens N] [--threads N] [--output FILE]

``gptq`` quantizes every expert of the first layers that have any (--layers, 3) by the default recipe, on --tokens of
calibration text (65,536), and extrapolates to the 46 that there are. ``nearest`` rounds the whole model to nearest
(rtn-w4g128), writes the bundle, and asks it: time to load, peak memory, tokens a second of prompts and of answers, and
an answer through the command line. It takes 35 GB of disk in FOLDER.

The checkpoint would be 60 GB. Its shards are holes, and what is read of them is noise: a window of a pool of normal
numbers, chosen by the name of the tensor, so that every read of a number gives the same. Each step is a process of its
own; what was finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.processes import Cost, Watched, glmexport
from benchmarks.synthetic import write_holes
from glmexport.foundation import machine

if TYPE_CHECKING:
    from torch import Tensor

FLASH = {
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "vocab_size": 154880,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
    "max_position_embeddings": 202752,
}
#: Layers with experts of the published model; the first of its 47 is dense.
SPARSE_LAYERS = 46
GIB = 2**30
PROMPT_TOKENS, GENERATED_TOKENS, ROUNDS = 128, 32, 3
#: Numbers in the pool; odd, so that rows of even length do not repeat one another.
_POOL = (1 << 24) + 1


@contextmanager
def noise() -> Iterator[None]:
    """Let every read of a checkpoint's weights give noise."""
    import torch

    from glmexport.checkpoint.header import TensorEntry
    from glmexport.checkpoint.shards import Shards

    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    plain = Shards.read

    def numbers(entry: TensorEntry, first: int, count: int) -> Tensor:
        start = (zlib.crc32(entry.name.encode()) + first) % _POOL
        parts = [pool[start : start + count]]
        while (left := count - sum(map(len, parts))) > 0:
            parts.append(pool[:left])
        values = torch.cat(parts)
        if entry.name.endswith("e_score_correction_bias"):
            return values.mul_(0.06).add_(7)
        if "norm" in entry.name:
            return values.mul_(0.02).add_(1)
        return values.mul_(0.02 if len(entry.shape) == 1 else entry.shape[-1] ** -0.5)

    def read(self: Shards, entry: TensorEntry, dtype: torch.dtype | None = None, rows: slice | None = None,
             columns: slice | None = None, *accepted: Any) -> Tensor:  # fmt: skip
        zeros = plain(self, entry, dtype, rows, columns, *accepted)
        width = math.prod(entry.shape[1:])
        first = (rows.start or 0) if rows else 0
        whole = zeros.shape if columns is None else (len(zeros), *entry.shape[1:])
        values = numbers(entry, first * width, math.prod(whole)).reshape(whole)
        # As they would be stored.
        stored = (values if columns is None else values[:, columns]).bfloat16()
        return zeros.copy_(stored)

    with patch.object(Shards, "read", read):
        yield


def quantized(folder: Path, recipe_name: str, tokens: int | None, threads: int) -> None:
    """Quantize the checkpoint in ``folder`` into a work directory there; without ``tokens`` write the bundle too."""
    import torch

    from glmexport.assembly.write import BundleContents, write_bundle
    from glmexport.calibration.corpus import shipped_documents
    from glmexport.calibration.sequences import pack
    from glmexport.cli.console import Terminal
    from glmexport.foundation.target import HOST, open_target
    from glmexport.quantization.job import QuantizationJob
    from glmexport.quantization.memory import plan_memory
    from glmexport.quantization.store import WorkDirectory
    from glmexport.quantization.walk import walk
    from glmexport.reference.reference import Reference
    from glmexport.workflows.job import recipe_for
    from glmexport.workflows.original import Original
    from glmexport.workflows.provenance import calibration_source, source_of

    torch.set_num_threads(threads)
    terminal, target = Terminal(), open_target(HOST)
    original = Original.open(str(folder / "checkpoint"), terminal)
    recipe = recipe_for(original, recipe_name, target)
    architecture, calibration, documents = original.architecture_for(target), None, shipped_documents("calibration")
    if recipe.calibration is not None:
        plan = recipe.calibration.model_copy(update={"tokens": tokens})
        calibration = pack(documents, original.tokenizer, plan, architecture.context_length)
    memory = plan_memory(architecture, recipe, None)
    work = WorkDirectory(folder / "work", {"recipe": recipe.name, "tokens": tokens})
    with noise():
        model = walk(QuantizationJob(original.checkpoint, architecture, recipe, calibration, work, memory, terminal))
        if calibration is not None:
            return
        reference = Reference(original.checkpoint, architecture)
        contents = BundleContents(
            architecture=architecture,
            weights=model.weights(architecture),
            rotary_tables=reference.rotary_tables(architecture.context_length),
            recipe=recipe,
            target=target,
            source=source_of(original, terminal, target),
            calibration=calibration_source(calibration, documents),
            records=model.records,
            tokenizer_files=original.tokenizer.files,
        )
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        write_bundle(folder / "bundle", contents, terminal)


def watched(folder: Path, recipe: str, tokens: int, threads: int) -> Cost:
    """Return what ``quantized`` took in a process of its own."""
    arguments = [folder, recipe, tokens, threads]
    command = [sys.executable, "-m", "benchmarks.experts_at_size", "--child", *arguments]
    cost = Watched(command, folder / "log").finish()
    if cost.exit_code:
        raise SystemExit(f"It ended with {cost.exit_code}; see {folder / 'log'}.")
    return cost


def by_gptq(folder: Path, layers: int, tokens: int, threads: int) -> dict[str, Any]:
    """Return the figures of the first ``layers`` with experts."""
    if not (folder / "checkpoint").exists():
        write_holes(folder / "checkpoint", FLASH | {"num_hidden_layers": layers + 1})
    cost = watched(folder, "w4g32", tokens, threads)
    notes = {
        path.stem: (path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))["note"])
        for path in (folder / "work").glob("*.json")
        if path.name != "job.json"
    }
    rows = []
    for index in range(1, layers + 1):
        step = f"block_{index:03d}"
        experts = [note for name, (_, note) in notes.items() if name.startswith(f"{step}.")]
        wall = notes[step][0] - notes[f"block_{index - 1:03d}"][0]
        rows.append(
            {
                "wall_s": wall,
                "experts": len(experts),
                "experts_s": sum(note["seconds"] for note in experts),
                "stages": notes[step][1]["stages"],
                "fallbacks": sum(bool(line["fallback"]) for note in experts for line in note["linears"]),
            }
        )
    each = sum(row["wall_s"] for row in rows) / len(rows)
    return {"cost": cost.document(), "tokens": tokens, "layers": rows, "hours_of_46": SPARSE_LAYERS * each / 3600}


def by_rounding(folder: Path, threads: int) -> dict[str, Any]:
    """Return the figures of the whole model, rounded to nearest."""
    from glmexport.validation.runtimes import Memory, Round, RuntimeRequest
    from glmexport.validation.speed import Worker

    if not (folder / "checkpoint").exists():
        write_holes(folder / "checkpoint", FLASH)
    figures: dict[str, Any] = {}
    if not (folder / "bundle" / "bundle.json").is_file():
        figures["cost"] = watched(folder, "rtn-w4g128", 0, threads).document()
    bundle = folder / "bundle"
    figures["bundle_bytes"] = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    request = RuntimeRequest(
        runtime="onnxruntime-genai",
        directory=str(bundle),
        prompt=tuple(range(100, 100 + PROMPT_TOKENS)),
        generated_tokens=GENERATED_TOKENS,
        threads=threads,
    )
    with Worker(request) as worker:
        rounds = [worker.ask("generate", Round) for _ in range(ROUNDS)]
        memory = worker.ask("memory", Memory)
        figures |= {
            "load_s": worker.loaded.load_s,
            "peak_bytes": memory.bytes,
            "prefill_tokens_per_s": max(PROMPT_TOKENS / each.ttft_s for each in rounds),
            "decode_tokens_per_s": max(len(each.steps_s) / sum(each.steps_s) for each in rounds),
        }
    asked = Watched(
        glmexport("run", bundle, "--prompt", "Hello!", "--max-tokens", 16, "--threads", threads), folder / "log"
    )
    figures["run"] = asked.finish().document()
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, recipe, tokens, threads = sys.argv[2:]
        quantized(Path(folder), recipe, int(tokens) or None, int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", default=["gptq", "nearest"])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "experts-at-size.json")
    options = parser.parse_args()
    document: dict[str, Any] = {}
    if options.output.is_file():
        document = json.loads(options.output.read_text(encoding="utf-8"))
    document |= {
        "command": "python -m benchmarks.experts_at_size",
        "processor": machine.processor_name(),
        "memory_bytes": machine.memory_bytes(),
        "threads": options.threads,
        "versions": machine.library_versions(),
    }
    for part in options.parts:
        folder = options.folder / part
        folder.mkdir(parents=True, exist_ok=True)
        if part == "gptq":
            found = document[part] = by_gptq(folder, options.layers, options.tokens, options.threads)
            print(
                f"experts of {len(found['layers'])} layers: {found['cost']['wall_s']:,.0f} s, "
                f"{found['cost']['processor_s']:,.0f} processor seconds, peak {found['cost']['peak_bytes'] / GIB:.2f} "
                f"GiB; {SPARSE_LAYERS} layers would take {found['hours_of_46']:.1f} hours"
            )
        else:
            found = document[part] = document.get(part, {}) | by_rounding(folder, options.threads)
            print(
                f"whole model: bundle {found['bundle_bytes'] / GIB:.2f} GiB; loaded in {found['load_s']:.0f} s, peak "
                f"{found['peak_bytes'] / GIB:.2f} GiB; prompts {found['prefill_tokens_per_s']:.1f} and answers "
                f"{found['decode_tokens_per_s']:.2f} tokens/s; run ended with {found['run']['exit_code']}"
            )
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
