"""What every peer's script shares: its command line, its clock, and the file it leaves.

Imported by scripts that other environments run, so it needs nothing beyond torch, safetensors and transformers. The
scripts are named by_NAME: the folder of a script comes first in its import path, and NAME itself would hide the peer.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Request:
    """One quantization that is asked for, and what is known about it when it is done."""

    checkpoint: Path
    calibration: Path
    out: Path
    bits: int
    group_size: int
    symmetric: bool
    setting: str
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Wall and processor time of a part; ``loading`` and ``saving`` are kept apart from ``quantizing``.

        On a shared machine the processor time of all threads says more than the wall time.
        """
        start, busy = time.perf_counter(), time.process_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        self.cpu_seconds[part] = self.cpu_seconds.get(part, 0.0) + time.process_time() - busy

    def ids(self) -> Tensor:
        """Calibration tokens [sequences, length] int64: whole sequences, nothing to pad or mask."""
        return load_file(self.calibration)["ids"]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every linear of the blocks, by its key in the checkpoint."""
        found: dict[str, tuple[int, int]] = {}
        for file in sorted(self.checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - not a mapping
                    shape = tuple(shard.get_slice(key).get_shape())
                    if re.fullmatch(r"model\.layers\.\d+\..+_proj\.weight", key) and len(shape) == 2:
                        found[key] = (shape[0], shape[1])
        return found

    def write(
        self, weights: dict[str, Tensor], stored_bits: int, settings: dict[str, Any], packages: list[str], **notes: Any
    ) -> None:
        """Leave the dequantized weights under the checkpoint's keys, and the facts as metadata.

        ``stored_bits`` is what codes, scales and zero points occupy in the types that the peer saves them in.

        Raises:
            ValueError: a linear is missing, has another shape or holds a value that is not finite.
        """
        shapes = self.shapes()
        weights = {key: value.detach().float().contiguous() for key, value in fused(weights, shapes).items()}
        if {key: tuple(value.shape) for key, value in weights.items()} != shapes:
            raise ValueError(f"weights {sorted(weights)} are not the linears of the checkpoint, {sorted(shapes)}")
        bad = [key for key, value in weights.items() if not value.isfinite().all()]
        if bad:
            raise ValueError(f"not finite: {bad}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        facts = {
            "seconds": self.seconds.pop("quantizing"),
            "cpu_seconds": self.cpu_seconds.pop("quantizing"),
            "other_seconds": self.seconds,
            "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
            "bits_per_weight": stored_bits / sum(value.numel() for value in weights.values()),
            "versions": {name: version(name) for name in ["torch", "transformers", *packages]},
            "threads": torch.get_num_threads(),
            "setting": self.setting,
            "settings": settings,
            **notes,
        }
        save_file(weights, self.out, {key: json.dumps(value, default=str) for key, value in facts.items()})


def request(settings: list[str]) -> Request:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--setting", choices=settings, default=settings[0])
    return Request(**vars(parser.parse_args()))


def fused(weights: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The weights with gate and up rows joined where the checkpoint stores them as one matrix."""
    joined = dict(weights)
    for key in shapes:
        if key.endswith("gate_up_proj.weight") and key not in joined:
            parts = [key.replace("gate_up_proj", name) for name in ("gate_proj", "up_proj")]
            if all(part in joined for part in parts):
                joined[key] = torch.cat([joined.pop(part) for part in parts])
    return joined


def load_model(checkpoint: Path) -> Any:
    """The original in fp32, for peers that quantize a model in memory; its matrices under the checkpoint's keys."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
