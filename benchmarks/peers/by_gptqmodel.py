"""GPTQModel: GPTQ as ModelCloud ships it. Weights are read back from the checkpoint that it saves."""

from __future__ import annotations

import os

# One worker a core: its own default on a machine of two is a single one, and torch's threads idle in its sweeps.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

import tempfile
from pathlib import Path

import torch
from common import request
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from torch import Tensor

#: damping and everything not named here is its default. act_group_aware is on by default; with desc_act it cannot be.
SETTINGS = {
    "default": {},
    "mse": {"mse": 2.0},
    "mse-2.4": {"mse": 2.4},
    "act-order": {"desc_act": True, "act_group_aware": False},
    "act-order-mse": {"desc_act": True, "act_group_aware": False, "mse": 2.0},
    "no-order": {"act_group_aware": False},
    # The checkpoint's own type, which is what its users load: faster on processors with units for it.
    "bf16": {},
}


def unpack(tensors: dict[str, Tensor], name: str, bits: int, version: int) -> tuple[Tensor, int]:
    """(weight [out, in] fp32, bits that its codes, scales and zero points occupy) of a saved linear."""
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales, groups = tensors[f"{name}.scales"], tensors[f"{name}.g_idx"].long()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
    zeros = ((qzeros[:, :, None] >> shifts[None, None, :]) & mask).flatten(1, 2)
    if version == 1:
        # The first format stores zero points minus one, modulo 2^bits.
        zeros = (zeros + 1) & mask
    weight = (codes - zeros[groups]).float() * scales[groups].float()
    stored = sum(value.numel() * value.element_size() * 8 for value in (qweight, qzeros, scales))
    if not torch.equal(groups, torch.arange(len(groups)) // (len(groups) // len(scales))):
        # Act-order: every column also has to say which group it is of.
        stored += groups.numel() * 32
    return weight.T, stored


def main() -> None:
    asked = request(list(SETTINGS))
    torch.manual_seed(0)
    config = QuantizeConfig(
        bits=asked.bits, group_size=asked.group_size, sym=asked.symmetric, device="cpu", **SETTINGS[asked.setting]
    )
    with tempfile.TemporaryDirectory() as folder:
        with asked.clock("loading"):
            dtype = torch.bfloat16 if asked.setting == "bf16" else torch.float32
            model = GPTQModel.load(str(asked.checkpoint), config, dtype=dtype)
        with asked.clock("quantizing"):
            # One whole sequence a batch and no tokenizer: nothing is concatenated, cut or padded.
            log = model.quantize([{"input_ids": row.tolist()} for row in asked.ids()], batch_size=1)
        with asked.clock("saving"):
            model.save(folder)
        tensors: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
        names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
        version = 2 if model.quantize_config.format == "gptq_v2" else 1
        unpacked = {name: unpack(tensors, name, asked.bits, version) for name in names}
        difference = check(folder, {name: weight for name, (weight, _) in unpacked.items()})
    settings = config.to_dict()
    # A folder of this run.
    settings["meta"].pop("offload_to_disk_path", None)
    asked.write(
        {f"{name}.weight": weight for name, (weight, _) in unpacked.items()},
        sum(stored for _, stored in unpacked.values()),
        settings,
        ["gptqmodel"],
        log=log,
        tokens=asked.ids().numel(),
        difference_from_its_own_linear=difference,
    )


def check(folder: str, weights: dict[str, Tensor]) -> float:
    """Largest relative difference between its own linears and these weights on random input."""
    # Its linears refuse fp32; of the two types that they take, fp16 rounds less.
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    modules = dict(loaded.model.named_modules())
    worst = 0.0
    for name, weight in weights.items():
        module = modules[name]
        x = torch.randn(4, weight.shape[1]).half()
        with torch.inference_mode():
            theirs = module(x).float()
        mine = x.float() @ weight.T
        if module.bias is not None:
            mine = mine + module.bias.float()
        worst = max(worst, float((theirs - mine).abs().max() / mine.abs().max()))
    return worst


if __name__ == "__main__":
    main()
