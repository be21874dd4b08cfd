"""AutoRound: rounding and clipping learned block by block with signed gradients. Weights are taken from its model."""

from __future__ import annotations

import torch
from auto_round import AutoRound
from common import load_model, request
from torch import Tensor
from transformers import AutoTokenizer

#: Everything not named here is its default: 200 iterations of 8 sequences.
SETTINGS = {
    "default": {"iters": 200},
    "light": {"iters": 50},
    "best": {"iters": 1000},
    "algorithm-extension": {"iters": 200, "enable_alg_ext": True},
    "rtn": {"iters": 0},
}


def stored(name: str, module: torch.nn.Linear, bits: int) -> tuple[Tensor, int]:
    """(weight as its files would hold it, bits that codes, scales and zero points occupy there).

    Its files store scales in fp16; in memory they are sometimes fp32 (symmetric without iterations).

    Raises:
        ValueError: the weights are not on the grid of its scales and zero points.
    """
    scale = module.scale.float()[:, :, None]
    zero = module.zp.float()[:, :, None] if isinstance(module.zp, Tensor) else float(module.zp)
    exact = module.weight.detach().float().reshape(*scale.shape[:2], -1) / scale + zero
    codes = exact.round()
    if (exact - codes).abs().max() > 1e-2 or codes.min() < 0 or codes.max() > 2**bits - 1:
        raise ValueError(f"{name}: its weights are not on the grid of its scales and zero points")
    # Its packed linears hold a zero point a group even where all are the same.
    occupied = codes.numel() * bits + scale.numel() * (16 + bits)
    return ((codes - zero) * scale.half().float()).reshape(module.weight.shape), occupied


def main() -> None:
    asked = request(list(SETTINGS))
    ids = asked.ids()
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    if (ids == tokenizer.pad_token_id).any():
        # It takes every pad token out of its loss, wherever it stands; GLM's is also its end of text.
        raise ValueError("the calibration text holds the pad token")
    batches = [{"input_ids": rows.clone(), "attention_mask": torch.ones_like(rows)} for rows in ids.split(8)]
    settings = {
        "bits": asked.bits,
        "group_size": asked.group_size,
        "sym": asked.symmetric,
        "nsamples": len(ids),
        "seqlen": ids.shape[1],
        "batch_size": 8,
        # Its default casts the model to bf16; in fp32 it is at least as good, and on most CPUs faster.
        "amp": False,
        "seed": 42,
        **SETTINGS[asked.setting],
    }
    rounder = AutoRound(model, tokenizer=tokenizer, dataset=batches, device_map="cpu", **settings)
    with asked.clock("quantizing"):
        model, _ = rounder.quantize()
    found = {
        f"{name}.weight": stored(name, module, asked.bits)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "scale")
    }
    weights = {key: weight for key, (weight, _) in found.items()}
    occupied = sum(bits for _, bits in found.values())
    asked.write(weights, occupied, settings, ["auto-round"], torch_compile=rounder.enable_torch_compile)


if __name__ == "__main__":
    main()
