"""A glm4 checkpoint as GGUF in bf16, and from it, by llama.cpp's own quantizer, in one of its mixtures.

    python to_gguf.py CHECKPOINT MODEL.gguf                  in bf16
    python to_gguf.py CHECKPOINT MODEL.gguf MIXTURE LIBRARIES BF16.gguf
    python to_gguf.py --describe MODEL.gguf                  bytes of the blocks' matrices, and read for a token

Without a tokenizer: what is timed is given token ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import torch
from by_llama_cpp import library
from safetensors import safe_open

#: LLAMA_FTYPE_MOSTLY_*: parts of llama.cpp's file format.
MIXTURES = {"Q4_0": 2, "Q4_K_M": 15}
#: llama_model_quantize_params begins with nthread and ftype.
_THREADS, _MIXTURE = 0, 1
#: Names of tensors in llama.cpp's own graph of the architecture.
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "post_ffw_norm",
}


def name_of(key: str) -> str:
    """The GGUF name of a checkpoint's tensor."""
    if key in OUTER:
        return OUTER[key]
    _, _, layer, part = key.split(".", 3)
    stem, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[stem]}.{kind}"


def write(checkpoint: Path, out: Path) -> None:
    """In bf16; vectors in fp32, as llama.cpp's converter has them."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "glm4":
        raise ValueError(f"{checkpoint}: {config['model_type']}, not glm4")
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(out, "glm4")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                tensor = shard.get_tensor(key)
                if tensor.ndim == 1:
                    writer.add_tensor(name_of(key), tensor.float().numpy())
                    continue
                rows = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name_of(key), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, mixture: str, folder: Path) -> None:
    llama = library(folder)
    parameters = llama.llama_model_quantize_default_params()
    parameters.words[_THREADS], parameters.words[_MIXTURE] = 2, MIXTURES[mixture]
    failed = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if failed:
        raise RuntimeError(f"llama_model_quantize: {failed}")


def describe(model: Path) -> dict[str, int]:
    """Bytes of the blocks' matrices, and of all that a decoded token reads."""
    tensors = gguf.GGUFReader(model).tensors
    blocks = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name.startswith("blk.") and tensor.data.ndim > 1)
    read = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != OUTER["model.embed_tokens.weight"])
    return {"blocks": blocks, "read": read}


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        print(json.dumps(describe(Path(sys.argv[2]))))
        sys.exit()
    checkpoint, out, *rest = sys.argv[1:]
    if rest:
        mixture, folder, source = rest
        quantize(Path(source), Path(out), mixture, Path(folder))
    else:
        write(Path(checkpoint), Path(out))
