"""The limits of a browser: a job beyond them is refused, with the figures, before the browser is started."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from safetensors import safe_open

from glmexport.devices.job import QUESTIONS, DeviceJob
from glmexport.foundation.errors import InputError

#: Bytes of a WebAssembly memory with 32-bit addresses, for which onnxruntime-web is compiled.
MEMORY = 1 << 32
_GIB = 1 << 30


def check_limits(directory: Path, job: DeviceJob) -> None:
    """Require that the job's graphs can be run, and fit into the memory of WebAssembly.

    The memory has at once: the weights; one file of them again, at most, while ONNX Runtime packs it for its kernels;
    and the logits of the longest text.

    Raises:
        InputError: they cannot, or do not.
    """
    if job.graphs.fixed:
        raise InputError(
            "The bundle has graphs of fixed shapes, which no browser needs and the page does not run.",
            next_step="Validate it on a device of its target, or build one for wasm or webgpu.",
        )
    folder = Path(job.graphs.scoring).parent.as_posix() + "/"
    sizes = [entry.size for entry in job.files if entry.path.startswith(folder)]
    with safe_open(directory / QUESTIONS, "numpy") as questions:
        longest = max(questions.get_slice(f"text.{index}.ids").get_shape()[0] for index in range(len(job.texts)))
    logits = 4 * longest * job.vocabulary_size
    needed = sum(sizes) + max(sizes) + logits
    if needed > MEMORY:
        weights, packed, scores, most = (size / _GIB for size in (sum(sizes), max(sizes), logits, MEMORY))
        raise InputError(
            f"The bundle does not fit into a browser: {weights:.2f} GiB of weights, {packed:.2f} GiB to pack the "
            f"largest file and {scores:.2f} GiB of logits are more than the {most:.0f} GiB that WebAssembly addresses.",
            next_step="Build it from a smaller model or with fewer bits, or validate it on another device.",
        )


def largest_tensor(directory: Path, job: DeviceJob) -> int:
    """Return the bytes of the largest tensor of the scoring graph; it must fit into one buffer of a WebGPU adapter."""
    initializers = ir.load(directory / job.graphs.scoring).graph.initializers.values()
    return max((value.const_value.nbytes for value in initializers if value.const_value is not None), default=0)
