"""A checkpoint that computes the same as another, with channels of very different sizes.

    python -m benchmarks.uneven CHECKPOINT FOLDER

Large models have a few channels that are far larger than the others, and small ones trained for a short time do not.
Here each channel gets a lognormal scale, and one in a hundred a further factor of 20; what writes the channel takes up
the inverse, so that in exact arithmetic nothing changes. ``benchmarks.quality FOLDER`` then tells what quantizers make
of it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glmexport.architecture.description import Linear
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.reference.describe import describe

SPREAD, OUTLIERS, FACTOR, SEED = 1.0, 0.01, 20.0, 5


def scales(count: int, spread: float, outliers: float, chance: torch.Generator) -> Tensor:
    """[count] fp32, of geometric mean one."""
    logarithms = torch.randn(count, generator=chance) * spread
    logarithms[torch.randperm(count, generator=chance)[: int(count * outliers)]] += math.log(FACTOR)
    return (logarithms - logarithms.mean()).exp()


def uneven(checkpoint: Checkpoint, spread: float = SPREAD, outliers: float = OUTLIERS) -> dict[str, Tensor]:
    """All tensors of ``checkpoint``, fp32, with scales in every place where they cancel out.

    ``spread`` is the standard deviation of their natural logarithms, ``outliers`` the share of the large ones.
    """
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    chance = torch.Generator().manual_seed(SEED)
    for layer in describe(checkpoint).layers:
        for tap, writer in layer.writers.items():
            rows = torch.tensor(writer.rows)
            written, channel = rows.unique(return_inverse=True)
            by_row = scales(len(written), spread, outliers, chance)
            source = tensors[writer.source.weight]
            source[written] /= by_row.reshape(-1, *[1] * (source.dim() - 1))
            if isinstance(writer.source, Linear) and writer.source.bias_key:
                tensors[writer.source.bias_key][written] /= by_row
            for linear in layer.taps[tap]:
                tensors[linear.weight] *= by_row[channel]
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path, help="must not exist")
    options = parser.parse_args()
    checkpoint = Checkpoint.open(options.checkpoint)
    shutil.copytree(checkpoint.path, options.folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = {**checkpoint.config.values, "dtype": "float32"}
    (options.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(uneven(checkpoint), options.folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
