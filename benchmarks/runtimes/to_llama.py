"""A Llama-shaped checkpoint of a glm4 one's matrices, for exporters that do not know glm4.

    python -m benchmarks.runtimes.to_llama CHECKPOINT OUT

Of the same matrices, gate and up apart; without biases and without the norms behind attention and MLP.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHARED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "pad_token_id",
    "bos_token_id", "hidden_act", "dtype",
)  # fmt: skip


def renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """What Llama has of a glm4 tensor, under its names."""
    if key.endswith(".bias") or "post_self_attn_layernorm" in key or "post_mlp_layernorm" in key:
        return {}
    if "gate_up_proj" in key:
        gate, up = tensor.chunk(2)
        return {
            key.replace("gate_up_proj", name): part.contiguous()
            for name, part in (("gate_proj", gate), ("up_proj", up))
        }
    return {key: tensor}


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    for file in checkpoint.glob("*token*.json"):
        shutil.copyfile(file, out / file.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    llama = {key: config[key] for key in _SHARED}
    llama |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]},
    }
    (out / "config.json").write_text(json.dumps(llama, indent=2), encoding="utf-8")
    weight_map = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                tensors |= renamed(key, shard.get_tensor(key))
        save_file(tensors, out / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    main()
