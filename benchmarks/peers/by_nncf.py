"""NNCF's 4-bit weight compression of a torch model: its scale estimation and AWQ. Its GPTQ is for OpenVINO models only.

AWQ divides columns of a weight by a factor that an activation is multiplied with; the factor is taken back into the
dequantized columns here, which is the same function.
"""

from __future__ import annotations

import re

import nncf
import torch
from common import load_model, request
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization import layers
from torch import Tensor

#: default is what a caller without data gets, round to nearest.
SETTINGS = {
    "default": {},
    "scale-estimation": {"scale_estimation": True},
    "awq": {"awq": True},
    "awq-scale-estimation": {"awq": True, "scale_estimation": True},
}


def dequantized(packed: Tensor, holder: torch.nn.Module) -> tuple[Tensor, int]:
    """(weight fp32, bits that codes, scales and zero points occupy) of what a decompressor stands in for."""
    scale = holder._scale
    occupied = packed.numel() * 8 + scale.numel() * 16
    if isinstance(holder, layers.INT4AsymmetricWeightsDecompressor):
        codes = layers.unpack_uint4(packed).reshape(holder.compressed_weight_shape).float()
        codes = codes - layers.unpack_uint4(holder._zero_point).reshape(holder.zero_point_shape).float()
        occupied += holder._zero_point.numel() * 8
    else:
        codes = layers.unpack_int4(packed).reshape(holder.compressed_weight_shape).float()
    return (codes * scale.float()).reshape(holder.result_shape), occupied


def main() -> None:
    asked = request(list(SETTINGS))
    ids = asked.ids()
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
        model.config.use_cache = False
    settings = {
        "mode": nncf.CompressWeightsMode.INT4_SYM if asked.symmetric else nncf.CompressWeightsMode.INT4_ASYM,
        "group_size": asked.group_size,
        "ratio": 1.0,
        # Neither an 8-bit head nor an 8-bit embedding.
        "all_layers": False,
        "backup_mode": nncf.BackupMode.NONE,
        "subset_size": len(ids),
        **SETTINGS[asked.setting],
    }
    dataset = nncf.Dataset([{"input_ids": row[None]} for row in ids])
    with asked.clock("quantizing"):
        model = nncf.compress_weights(model, dataset=dataset, **settings)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    weights: dict[str, Tensor] = {}
    occupied, factors = 0, 0
    for name, hook in get_hook_storage(model).named_modules():
        if key := re.fullmatch(r"post_hooks\.(.+)__0\.0", name):
            key = key[1].replace(":", ".")
            weights[key], bits = dequantized(parameters[key], hook)
            occupied += bits
    for name, hook in get_hook_storage(model).named_modules():
        if isinstance(hook, layers.SQMultiply):
            # Hooks are numbered by the order in which the forward pass comes by them: one a block.
            block = int(re.fullmatch(r"pre_hooks\.model/mlp/mul/(\d+)__0\.0", name)[1])
            weights[f"model.layers.{block}.mlp.down_proj.weight"] *= hook.scale.detach().flatten()
            occupied += hook.scale.numel() * 32
            factors += 1
    difference = check(model, load_model(asked.checkpoint), weights, ids[:1])
    if difference > 0.02:
        raise ValueError(f"these weights are not the compressed model's: its logits differ by {difference:.3g}")
    asked.write(weights, occupied, settings, ["nncf"], awq_factors=factors, difference_of_logits=difference)


@torch.inference_mode()
def check(compressed: torch.nn.Module, original: torch.nn.Module, weights: dict[str, Tensor], ids: Tensor) -> float:
    """Relative difference between the logits of the compressed model and of the original with these weights."""
    original.load_state_dict(original.state_dict() | weights)
    theirs, mine = compressed(input_ids=ids).logits, original(input_ids=ids).logits
    return float((theirs - mine).norm() / mine.norm())


if __name__ == "__main__":
    main()
