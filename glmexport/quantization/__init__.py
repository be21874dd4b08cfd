"""Matrices into codes, scales and zero points: pure functions on arrays, and the walk that applies them."""

from glmexport.quantization.linear import QuantizedLinear
from glmexport.quantization.memory import MemoryPlan, plan_memory
from glmexport.quantization.nearest import round_to_nearest
from glmexport.quantization.packing import pack_codes, pack_zero_points, unpack
from glmexport.quantization.problem import Problem
from glmexport.quantization.record import AllocatedGroup, ExpertCoverage, QuantizedMatrix, coverage
from glmexport.quantization.solve import Solution, gptq
from glmexport.quantization.steps import EMBEDDING, HEAD, block_step
from glmexport.quantization.store import WorkDirectory, sha256, write_atomically
from glmexport.quantization.walk import Walk

__all__ = [
    "EMBEDDING",
    "HEAD",
    "AllocatedGroup",
    "ExpertCoverage",
    "MemoryPlan",
    "Problem",
    "QuantizedLinear",
    "QuantizedMatrix",
    "Solution",
    "Walk",
    "WorkDirectory",
    "block_step",
    "coverage",
    "gptq",
    "pack_codes",
    "pack_zero_points",
    "plan_memory",
    "round_to_nearest",
    "sha256",
    "unpack",
    "write_atomically",
]
