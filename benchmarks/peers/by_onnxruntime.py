"""ONNX Runtime's own weight-only quantizers, on a graph of one MatMul for every linear.

GPTQ gets the inputs that each linear sees in the original, as it would from a graph of the whole model: its Hessians
do not follow what earlier layers lost.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from common import Request, load_model, request
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor import weight_only
from torch import Tensor

#: default is the round-to-nearest of MLAS; rtn, k_quant and gptq come from neural_compressor's code inside the package.
SETTINGS = {
    "default": {},
    "rtn": {},
    "k_quant": {},
    "hqq": {},
    "gptq": {"percdamp": 0.01, "block_size": 128},
    "gptq-act-order-mse": {"percdamp": 0.01, "block_size": 128, "actorder": True, "mse": True},
}
#: Formats that an algorithm has; all others have both.
ASYMMETRIC_ONLY = ("k_quant", "hqq")


class BlockDone(Exception):
    """Stops a forward pass behind the block whose inputs are wanted."""


class Reader(CalibrationDataReader):
    """Inputs of one linear, a batch of sequences at a time."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = iter([{"x": batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)

    def __deepcopy__(self, memo: object) -> Reader:
        # The quantizer copies its reader, and with it all inputs.
        return self


def inputs(model: torch.nn.Module, block: torch.nn.Module, ids: Tensor) -> dict[torch.nn.Module, list[Tensor]]:
    """What every linear of a block sees in the original."""
    seen: dict[torch.nn.Module, list[Tensor]] = {m: [] for m in block.modules() if isinstance(m, torch.nn.Linear)}

    def stop(*_: object) -> None:
        raise BlockDone

    hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].detach())) for m in seen]
    hooks.append(block.register_forward_hook(stop))
    for rows in ids.split(8):
        try:
            with torch.inference_mode():
                model.model(rows, use_cache=False)
        except BlockDone:
            pass
    for hook in hooks:
        hook.remove()
    return seen


def matmul(weight: Tensor) -> onnx.ModelProto:
    """A graph that multiplies by ``weight`` [out, in]."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.T.numpy()), "w")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width])
        for name, width in (("x", weight.shape[1]), ("y", weight.shape[0]))
    ]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], [initializer])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def unpack(model: onnx.ModelProto, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes [out, groups, size], scales, zero points or None) of the only MatMulNBits."""
    (node,) = model.graph.node
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    packed, scales, *rest = (values[name] for name in node.input[1:])
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = lambda array: ((array[..., None] >> shifts) & (2**bits - 1)).reshape(*array.shape[:-1], -1)  # noqa: E731
    codes = spread(packed)
    scales = scales.reshape(codes.shape[0], -1)
    if not rest:
        return codes, scales, None
    zeros = rest[0].reshape(codes.shape[0], -1)
    return codes, scales, spread(zeros)[:, : scales.shape[1]] if zeros.dtype == np.uint8 else zeros


def algorithm(asked: Request, batches: list[Tensor]) -> nbits.WeightOnlyQuantConfig | None:
    """The configuration that names the algorithm; None is the default."""
    match asked.setting:
        case "rtn":
            return nbits.RTNWeightOnlyQuantConfig()
        case "k_quant":
            return nbits.KQuantWeightOnlyQuantConfig()
        case "hqq":
            return nbits.HQQWeightOnlyQuantConfig(block_size=asked.group_size, bits=asked.bits)
        case "default":
            return None
    return nbits.GPTQWeightOnlyQuantConfig(Reader(batches), **SETTINGS[asked.setting])


def main() -> None:
    asked = request(list(SETTINGS))
    if asked.symmetric and asked.setting in ASYMMETRIC_ONLY:
        raise ValueError(f"{asked.setting} has no symmetric format; it would ignore the wish")
    with asked.clock("loading"):
        model = load_model(asked.checkpoint)
    captured: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def capture(*, q_weight, scale, zero_point, k_blocks, node, **_):
        # RTN, k_quant and GPTQ pack zero points without padding rows to whole bytes, and fail where a row has an odd
        # number of groups (384 columns in groups of 128), so their integers are taken before that.
        rows = q_weight.shape[0] // k_blocks
        grid = [None if value is None else np.reshape(value, (rows, k_blocks)) for value in (scale, zero_point)]
        captured.append((q_weight.reshape(rows, k_blocks, -1), grid[0], grid[1]))
        return node, []

    weight_only.make_matmul_weight_only_node = capture
    names = {module: name for name, module in model.named_modules()}
    weights: dict[str, Tensor] = {}
    occupied = 0
    for block in model.model.layers:
        seen: dict[torch.nn.Module, list[Tensor]] = {}
        if asked.setting.startswith("gptq"):
            with asked.clock("quantizing"):
                seen = inputs(model, block, asked.ids())
        for module in [m for m in block.modules() if isinstance(m, torch.nn.Linear)]:
            weight = module.weight.detach()
            captured.clear()
            with asked.clock("quantizing"):
                config = algorithm(asked, seen.get(module, []))
                quantizer = nbits.MatMulNBitsQuantizer(
                    matmul(weight), asked.bits, asked.group_size, asked.symmetric, algo_config=config
                )
                quantizer.process()
            codes, scales, zeros = captured[0] if captured else unpack(quantizer.model.model, asked.bits)
            middle = 2 ** (asked.bits - 1) if zeros is None else zeros[:, :, None].astype(np.float32)
            value = torch.from_numpy((codes.astype(np.float32) - middle) * scales[:, :, None].astype(np.float32))
            weights[f"{names[module]}.weight"] = value.reshape(len(value), -1)[:, : weight.shape[1]]
            occupied += codes.size * asked.bits + scales.size * scales.itemsize * 8
            if zeros is not None:
                occupied += zeros.size * (32 if zeros.dtype == np.float32 else asked.bits)
    asked.write(weights, occupied, SETTINGS[asked.setting], ["onnx", "onnxruntime"])


if __name__ == "__main__":
    main()
