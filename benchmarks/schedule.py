"""Hours that quantization takes on several ranks, simulated from what its parts took on one.

    python -m benchmarks.schedule WORK_DIRECTORY [--layers N] [--ranks N ...]

A walk notes how long each layer and each routed expert took. Routed experts are dealt out by the rule of the walk
(``quantization.ranks.longest_first``), by the seconds that they took instead of the expected ones. For the rest of a
layer the two bounds are given: that all of it is shared evenly, and that none of it is. Factorizations, which every
rank repeats for itself, and what is sent between ranks keep the truth from the lower one. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmexport.quantization.ranks import longest_first


@dataclass(frozen=True)
class LayerSeconds:
    """The seconds that one rank took for each routed expert of a layer, and for the rest of the layer."""

    experts: tuple[float, ...]
    rest: float


def wall_seconds(layers: Sequence[LayerSeconds], ranks: int) -> tuple[float, float]:
    """Return the least and the most seconds that ``layers`` take, one after the other, on so many ranks."""
    least = most = 0.0
    for layer in layers:
        load = [0.0] * ranks
        for seconds, owner in zip(layer.experts, longest_first(layer.experts, ranks), strict=True):
            load[owner] += seconds
        least += max(load) + layer.rest / ranks
        most += max(load) + layer.rest
    return least, most


def noted(work: Path) -> list[LayerSeconds]:
    """Return the layers that were committed to a work directory, each in one go, by their notes."""
    layers = []
    for path in sorted(work.glob("block_???.json")):
        note = json.loads(path.read_text(encoding="utf-8"))["note"]
        routed = sorted(work.glob(f"{path.stem}.expert_*.json"))
        experts = tuple(json.loads(each.read_text(encoding="utf-8"))["note"]["seconds"] for each in routed)
        # The stages of a layer count its experts, too.
        whole = sum(wall for wall, _ in note["stages"].values())
        layers.append(LayerSeconds(experts, max(0.0, whole - sum(experts))))
    return layers


def main() -> None:
    """Print the hours for each number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--layers", type=int, help="so many layers like the last one noted"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    arguments = parser.parse_args()
    layers = noted(arguments.work)
    if arguments.layers:
        layers = layers[-1:] * arguments.layers
    print("| ranks | hours, simulated |\n|---|---|")
    for ranks in arguments.ranks:
        least, most = (seconds / 3600 for seconds in wall_seconds(layers, ranks))
        print(f"| {ranks} | {least:.2f} to {most:.2f} |" if ranks > 1 else f"| 1 | {least:.2f} |")


if __name__ == "__main__":
    main()
