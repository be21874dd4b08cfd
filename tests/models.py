"""Small checkpoints with random weights, for tests that need a model and not a trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.uneven import uneven
from glmexport.checkpoint.checkpoint import Checkpoint

TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"]


def write_tokenizer(directory: Path) -> int:
    """A byte-level tokenizer with GLM's special tokens; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "additional_special_tokens": SPECIAL[1:],
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()


#: What families with latent attention are given in place of heads of one size.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
FAMILY: dict[str, dict[str, Any]] = {"glm4_moe_lite": LATENT, "glm_moe_dsa": LATENT}


def write_checkpoint(directory: Path, model_type: str = "glm4", seed: int = 0, **changes: Any) -> Any:
    """A checkpoint of ``model_type`` with random bf16 weights; returns the transformers model in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(directory)
    settings = {
        "vocab_size": -(-vocabulary // 8) * 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "pad_token_id": vocabulary - len(SPECIAL),
        "eos_token_id": [vocabulary - len(SPECIAL), vocabulary - 3],
        "rms_norm_eps": 1e-5,
    }
    settings |= FAMILY.get(model_type, {}) | changes
    if model_type in FAMILY:
        settings.setdefault("mlp_layer_types", ["dense"] * settings["num_hidden_layers"])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if "norm" in name else 0.05
            parameter.copy_((torch.randn_like(parameter) * spread + ("norm" in name)).bfloat16().float())
            if name.endswith("bias"):
                parameter.copy_((torch.randn_like(parameter) * 0.3).bfloat16().float())
            if name.endswith("gate.weight"):
                # Router logits of order one, so that experts differ in how often they are chosen.
                parameter.copy_((torch.randn_like(parameter) * 0.15).bfloat16().float())
    # Loaded anew in fp32: casting the model back would leave its rotary frequencies rounded to bf16.
    model.bfloat16().save_pretrained(directory)
    _write_router_biases(directory, seed)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def write_predicting(
    directory: Path, model_type: str, *, copies: bool = True, seed: int = 0, **changes: Any
) -> tuple[Any, Any]:
    """As ``write_checkpoint``, with a layer behind the last one that predicts a token further ahead.

    With ``copies`` it stores embedding and lm_head once more, as GLM-4.5 does. Returns the model in transformers, and
    that layer's decoder layer there.
    """
    layers = changes.pop("num_hidden_layers", 3)
    lists = {key: [*value, value[-1]] for key, value in changes.items() if isinstance(value, list) and "types" in key}
    if "indexer_types" in lists:
        lists["indexer_types"][-1] = "full"
    deeper = write_checkpoint(directory, model_type, seed, num_hidden_layers=layers + 1, **changes | lists)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = load_file(directory / "model.safetensors")
    size = tensors["model.norm.weight"].shape[0]
    prefix = f"model.layers.{layers}"
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}.{norm}.weight"] = (1 + 0.2 * torch.randn(size, generator=generator)).bfloat16()
    tensors[f"{prefix}.eh_proj.weight"] = (0.05 * torch.randn(size, 2 * size, generator=generator)).bfloat16()
    if copies:
        tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    config |= {key: config[key][:layers] for key in config if key.endswith("_types") and config[key]}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    return model, deeper.model.layers[layers]


def _write_router_biases(directory: Path, seed: int) -> None:
    """In fp32 and around 7, as published checkpoints have them: bf16 would make 8 of 238 values of a real one."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    biases = [key for key in sorted(tensors) if key.endswith("e_score_correction_bias")]
    if biases:
        generator = torch.Generator().manual_seed(seed)
        for key in biases:
            tensors[key] = 7 + 0.06 * torch.randn(len(tensors[key]), generator=generator)
        save_file(tensors, path, {"format": "pt"})


#: Sixteen experts in four groups behind one dense layer.
MIXTURE: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


def write_uneven(path: Path, family: str = "glm4", spread: float = 1.5, **changes: Any) -> Checkpoint:
    """A checkpoint whose channels differ in size, by scales that cancel out in what the model computes.

    ``spread`` is the standard deviation of their natural logarithms.
    """
    write_checkpoint(path, family, **changes)
    save_file(uneven(Checkpoint.open(path), spread, outliers=0), path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return Checkpoint.open(path)


#: The smallest model of every family that has each of its kinds of layers.
TINY: dict[str, dict[str, Any]] = {
    "glm": {"num_hidden_layers": 1},
    "glm4": {"num_hidden_layers": 1},
    "glm4_moe": MIXTURE | {"num_hidden_layers": 2, "use_qk_norm": True},
    "glm4_moe_lite": MIXTURE | {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": MIXTURE
    | {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full"],
        "index_topk": 8,
        "index_n_heads": 4,
        "index_head_dim": 24,
    },
}


def edit_config(directory: Path, without: Sequence[str] = (), **changes: Any) -> None:
    """Change keys of config.json, and take some out."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if key not in without}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_tensors(directory: Path, without: Sequence[str] = (), **changes: torch.Tensor) -> None:
    """Change tensors of model.safetensors, and take some out."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if key not in without}, path, {"format": "pt"})
