"""Routing agreement: the experts that positions are sent to with the bundle's weights, and with the original's."""

from __future__ import annotations

import torch
from torch import Tensor

from glmexport.results.routing import LayerRouting


class Routes:
    """The experts of every position of the same texts in the same order, layer by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, list[Tensor]] = {}

    def add(self, layer: int, experts: Tensor) -> None:
        """Add the experts of the next positions, ``experts`` [positions, chosen], in any order."""
        self._layers.setdefault(layer, []).append(experts.sort(-1).values.short())

    @property
    def layers(self) -> dict[int, Tensor]:
        """The experts of each layer, [positions, chosen] int16, increasing along each row."""
        return {layer: torch.cat(parts) for layer, parts in self._layers.items()}


def routing_agreement(original: Routes, bundle: Routes) -> tuple[LayerRouting, ...]:
    """Return how often both send a position to the same experts."""
    found = []
    after = bundle.layers
    for layer, before in original.layers.items():
        common = (before[:, :, None] == after[layer][:, None, :]).any(-1)
        found.append(
            LayerRouting(
                layer=layer,
                positions=len(before),
                same_set=float(common.all(-1).double().mean()),
                same_experts=float(common.double().mean()),
            )
        )
    return tuple(found)
