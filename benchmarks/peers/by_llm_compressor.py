"""llm-compressor: GPTQ as vLLM's project ships it, on grids that are fixed before the sweep."""

from __future__ import annotations

import torch
from common import load_model, request
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor
from torch.utils.data import DataLoader

#: damping 0.01, blocks of 128 and static activation order are its defaults.
SETTINGS = {"default": {}, "mse": {"observer": "mse"}}


def stored(name: str, module: torch.nn.Linear, bits: int, symmetric: bool) -> tuple[Tensor, int]:
    """(weight fp32, bits that codes, scales and zero points occupy in its packed format).

    Raises:
        ValueError: the weights are not on the grid of its scales and zero points.
    """
    scale, weight = module.weight_scale.detach(), module.weight.detach().float()
    zero = module.weight_zero_point.detach() if hasattr(module, "weight_zero_point") else torch.zeros(())
    grid = scale.float()[:, :, None]
    offset = zero.float()[:, :, None] if zero.ndim else zero
    exact = weight.reshape(*grid.shape[:2], -1) / grid + offset
    codes = exact.round()
    if (exact - codes).abs().max() > 1e-2 or codes.min() < -(2 ** (bits - 1)) or codes.max() > 2 ** (bits - 1) - 1:
        raise ValueError(f"{name}: its weights are not on the grid of its scales and zero points")
    occupied = codes.numel() * bits + scale.numel() * (scale.element_size() * 8 + (0 if symmetric else bits))
    return ((codes - offset) * grid).reshape(weight.shape), occupied


def main() -> None:
    asked = request(list(SETTINGS))
    torch.manual_seed(0)
    ids = asked.ids()
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
    weights = {
        "num_bits": asked.bits,
        "type": "int",
        "symmetric": asked.symmetric,
        "strategy": "group",
        "group_size": asked.group_size,
        **SETTINGS[asked.setting],
    }
    modifier = GPTQModifier(config_groups={"blocks": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    # A loader that is ready: given a dataset it would tokenize, cut and shuffle.
    loader = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    with asked.clock("quantizing"):
        oneshot(model=model, dataset=loader, recipe=[modifier], num_calibration_samples=len(ids))
    found = {
        f"{name}.weight": stored(name, module, asked.bits, asked.symmetric)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale")
    }
    asked.write(
        {key: weight for key, (weight, _) in found.items()},
        sum(occupied for _, occupied in found.values()),
        {"weights": weights, "dampening_frac": modifier.dampening_frac, "block_size": modifier.block_size},
        ["llmcompressor", "compressed-tensors"],
        # Linears that it rounded to nearest because their Hessian could not be inverted.
        fallbacks=modifier._rtn_fallback_module_names,
    )


if __name__ == "__main__":
    main()
