"""``glmexport inspect``: the content of a checkpoint and the cost of building it, without reading its weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from glmexport.cli.console import Terminal, duration, emit, gibibytes
from glmexport.cli.options import adapter_option, checkpoint_argument, json_option, memory_option, threads_option


@click.command()
@checkpoint_argument
@adapter_option
@click.option("--recipe", help="Estimate for this recipe instead of each target's default.")
@memory_option
@threads_option
@json_option
def inspect(
    checkpoint: str, adapter: str | None, recipe: str | None, max_memory: int | None, threads: int, as_json: bool
) -> None:
    """Show family, parameters by part, context and tokenizer of CHECKPOINT, and an estimate for every target."""
    import torch

    from glmexport.architecture.registry import UNFINISHED
    from glmexport.checkpoint.checkpoint import Checkpoint
    from glmexport.workflows.job import Original, listed_unused

    terminal = Terminal()
    opened = Checkpoint.open(checkpoint, None, adapter)
    if opened.model_type in UNFINISHED:
        _tell_missing(terminal, opened, UNFINISHED[opened.model_type](opened), as_json)
        return
    torch.set_num_threads(threads)
    original = Original.open(checkpoint, terminal, adapter)
    document = {
        **_description(original),
        "tokenizer": _tokenizer(original),
        "estimates": _estimates(original, recipe, max_memory),
    }
    if as_json:
        emit(json.dumps(document, indent=2, ensure_ascii=False))
        return
    tokenizer, merged = document["tokenizer"], original.checkpoint.adapter
    terminal.facts(
        original.checkpoint.name,
        {
            "path": document["path"],
            **({"adapter": f"{merged.name} ({merged.path}): {merged.summary}"} if merged else {}),
            "family": document["family"],
            "layers": str(document["layers"]),
            **_mixture_fact(document["experts"]),
            "context": f"{document['context_length']:,} tokens",
            **_quantization(original),
            "stored": f"{gibibytes(document['bytes'])} of {', '.join(document['dtypes'])}",
            "KV cache": _cache(document),
            "vocabulary": f"{tokenizer['vocabulary']:,} tokens",
            "chat template": "yes" if tokenizer["chat_template"] else "no",
            "prefix": " ".join(tokenizer["prefix"]) or "none",
            "special tokens": " ".join(tokenizer["special_tokens"]),
            "tokens a character": ", ".join(
                f"{name} {value:.2f}" for name, value in tokenizer["tokens_per_character"].items()
            ),
            **({"MTP layer": _drafting(document)} if document["token_prediction"] else {}),
            **{f"unused {name}": reason for name, reason in listed_unused(original.unused).items()},
        },
    )
    terminal.console.print(_parts_table(document["parameters"]))
    terminal.console.print(_estimates_table(document["estimates"]))
    for row in document["estimates"]:
        if row["refused"]:
            terminal.remark(f"{row['target']}: {row['refused']}")


def _tell_missing(terminal: Terminal, checkpoint: Any, missing: tuple[str, ...], as_json: bool) -> None:
    """What a checkpoint is that is known and cannot be built."""
    document = {
        "name": checkpoint.name,
        "path": str(Path(checkpoint.path)),
        "family": checkpoint.model_type,
        "parameters": {"all": checkpoint.parameters},
        "bytes": checkpoint.bytes,
        "dtypes": sorted({entry.dtype for entry in checkpoint.tensors.values()}),
        "missing": list(missing),
    }
    if as_json:
        emit(json.dumps(document, indent=2, ensure_ascii=False))
        return
    facts = {
        "path": document["path"],
        "family": f"{document['family']}, which cannot be built yet",
        "parameters": f"{checkpoint.parameters:,}",
        "stored": f"{gibibytes(checkpoint.bytes)} of {', '.join(document['dtypes'])}",
        **{f"missing {number}": part for number, part in enumerate(missing, 1)},
    }
    terminal.facts(checkpoint.name, facts)


def _description(original: Any) -> dict[str, Any]:
    checkpoint, architecture = original.checkpoint, original.architecture
    latents = architecture.latent_values_per_token
    parts: dict[str, int] = {"embedding": architecture.vocabulary_size * architecture.hidden_size}
    for _, linear in architecture.linears:
        if not (linear is architecture.lm_head and architecture.tied):
            parts[linear.part] = parts.get(linear.part, 0) + linear.in_features * linear.out_features
    routers = sum(math.prod(shape) for layer in architecture.layers for shape in layer.mlp.kept.values())
    if routers:
        parts["router"] = routers
    if architecture.token_prediction:
        shapes = architecture.token_prediction.own_shapes()
        parts["MTP layer"] = sum(math.prod(shape) for shape in shapes.values())
    parts["norms and biases"] = checkpoint.parameters - sum(parts.values()) - _unused_elements(original)
    return {
        "name": checkpoint.name,
        "path": str(Path(checkpoint.path)),
        "adapter": _adapter(checkpoint.adapter),
        "family": architecture.family,
        "layers": len(architecture.layers),
        "context_length": architecture.context_length,
        "experts": _experts(architecture),
        "parameters": {**parts, "all": checkpoint.parameters},
        "bytes": checkpoint.bytes,
        "quantization": _formats(checkpoint),
        "dtypes": sorted({entry.dtype for entry in checkpoint.tensors.values()}),
        "kv_bytes_per_token": architecture.kv_values_per_token * 4,
        "latent_kv_bytes_per_token": None if latents is None else latents * 4,
        "unused": original.unused,
        "token_prediction": _token_prediction(original),
    }


def _token_prediction(original: Any) -> dict[str, Any] | None:
    """What becomes of the layer that predicts further ahead, target by target; None where there is none."""
    from glmexport.foundation.target import shipped_targets
    from glmexport.workflows.job import NO_DRAFTS

    draft = original.architecture.token_prediction
    if draft is None:
        return None
    fates = {target.name: "drafts" if original.drafts(target) else NO_DRAFTS for target in shipped_targets()}
    return {"layer": draft.layer.index, "tensors": len(draft.own_shapes()), "targets": fates}


def _drafting(document: dict[str, Any]) -> str:
    found = document["token_prediction"]
    by_fate: dict[str, list[str]] = {}
    for target, fate in found["targets"].items():
        by_fate.setdefault(fate, []).append(target)
    told = "; ".join(
        f"{', '.join(names)}: {'a draft graph, for run --speculate mtp' if fate == 'drafts' else f'unused, it {fate}'}"
        for fate, names in by_fate.items()
    )
    return f"layer {found['layer']}, {found['tensors']} tensors. {told}"


def _cache(document: dict[str, Any]) -> str:
    heads, latents = document["kv_bytes_per_token"], document["latent_kv_bytes_per_token"]
    if latents is None:
        return f"{heads:,} bytes a token in fp32"
    return f"{latents:,} bytes a token in fp32 as latents, {heads:,} as keys and values of every head"


def _experts(architecture: Any) -> dict[str, int] | None:
    """Of the layers that are mixtures of experts; None where there are none."""
    mixtures = [layer.mlp for layer in architecture.layers if layer.mlp.routed]
    if not mixtures:
        return None
    router = mixtures[0].router
    return {"layers": len(mixtures), "routed": router.experts, "chosen": router.chosen, "groups": router.groups}


def _mixture_fact(experts: dict[str, int] | None) -> dict[str, str]:
    if experts is None:
        return {}
    groups = f", in {experts['groups']} groups" if experts["groups"] > 1 else ""
    return {"experts": f"{experts['chosen']} of {experts['routed']} a token in {experts['layers']} layers{groups}"}


def _formats(checkpoint: Any) -> dict[str, Any] | None:
    """Method, and number of matrices by format; None for a checkpoint in full precision."""
    if not checkpoint.quantized:
        return None
    counts = Counter(form.label for form in checkpoint.quantized.values())
    return {"method": "gptq", "matrices": dict(counts.most_common())}


def _quantization(original: Any) -> dict[str, str]:
    from glmexport.workflows.job import formats_of

    return {"quantized": f"gptq, {formats_of(original)}"} if original.checkpoint.quantized else {}


def _adapter(adapter: Any) -> dict[str, Any] | None:
    if adapter is None:
        return None
    return {
        "name": adapter.name,
        "path": str(adapter.path),
        "updates": {
            key: {"rank": update.rank, "scale": update.scale, "dora": update.magnitude is not None}
            for key, update in adapter.updates.items()
        },
        "replaced": sorted(adapter.replaced),
    }


def _unused_elements(original: Any) -> int:
    tensors = original.checkpoint.tensors
    return sum(tensors[key].elements for key in original.unused if key in tensors)


def _tokenizer(original: Any) -> dict[str, Any]:
    """What the tokenizer knows, and how many tokens a character of each language of the corpora costs it."""
    from glmexport.calibration.corpus import shipped_documents

    tokenizer = original.tokenizer
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    texts: dict[str, str] = {}
    for document in shipped_documents("evaluation"):
        texts.setdefault(document.language, document.text)
    return {
        "vocabulary": tokenizer.vocabulary_size,
        "chat_template": tokenizer.has_chat_template,
        "prefix": [names.get(token, str(token)) for token in tokenizer.prefix],
        "special_tokens": list(tokenizer.special_tokens),
        "tokens_per_character": {language: len(tokenizer.encode(text)) / len(text) for language, text in texts.items()},
    }


def _estimates(original: Any, recipe: str | None, max_memory: int | None) -> list[dict[str, Any]]:
    from glmexport.foundation.errors import InputError
    from glmexport.foundation.target import shipped_targets
    from glmexport.graph.build import cache_bytes_per_token
    from glmexport.workflows.estimate import estimate, measured_flops
    from glmexport.workflows.job import Job, recipe_for, refuse_formats

    flops = measured_flops()
    rows = []
    for target in shipped_targets():
        chosen = recipe_for(original, recipe, target)
        architecture = original.architecture_for(target)
        expected = estimate(architecture, chosen, flops, max_memory)
        refused = None
        try:
            refuse_formats(original, Job(target, chosen, Path()))
        except InputError as error:
            refused = error.message
        cached = cache_bytes_per_token(architecture, target.graph)
        sizes = {**vars(expected), "cache_bytes_per_token": cached, "context_length": architecture.context_length}
        rows.append({"target": target.name, "recipe": chosen.name, **sizes, "refused": refused})
    return rows


def _parts_table(parts: dict[str, int]) -> Table:
    table = Table(
        title="Parameters",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("part", "parameters", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, count in parts.items():
        table.add_row(name, f"{count:,}", f"{count / parts['all']:.1%}")
    return table


def _estimates_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="\nEstimates for this machine",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("target", "recipe", "bundle", "bits per weight", "context", "KV a token", "peak memory", "time"):
        table.add_column(column, justify="left" if column in ("target", "recipe") else "right")
    for row in rows:
        if row["refused"]:
            continue
        table.add_row(
            row["target"],
            row["recipe"],
            gibibytes(row["bundle_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['context_length']:,}",
            f"{row['cache_bytes_per_token']:,} B",
            gibibytes(row["peak_memory_bytes"]),
            duration(row["seconds"]),
        )
    return table
