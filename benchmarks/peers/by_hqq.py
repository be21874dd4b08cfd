"""HQQ: scales and zero points by half-quadratic optimization, from the weights alone. It sees no calibration text."""

from __future__ import annotations

import torch
from common import load_model, request
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor

#: Groups along the inputs (axis 1) are its default and what other formats can hold; axis 0 groups along the outputs.
SETTINGS = {"default": {"axis": 1}, "axis-0": {"axis": 0}}


def main() -> None:
    asked = request(list(SETTINGS))
    if asked.symmetric:
        raise ValueError("HQQ has no symmetric format: the zero point is what it optimizes")
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
    weights: dict[str, Tensor] = {}
    occupied = 0
    for name, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        config = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group_size, **SETTINGS[asked.setting])
        with asked.clock("quantizing"):
            # fp16, its default, is what it stores scales and zero points in; zero points are not integers.
            layer = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        scale, zero = layer.meta["scale"], layer.meta["zero"]
        codes = layer.unpack(dtype=torch.float32)
        weights[f"model.layers.{name}.weight"] = ((codes - zero.float()) * scale.float()).reshape(module.weight.shape)
        occupied += codes.numel() * asked.bits
        occupied += sum(value.numel() * value.element_size() * 8 for value in (scale, zero))
    asked.write(weights, occupied, SETTINGS[asked.setting], ["hqq"])


if __name__ == "__main__":
    main()
