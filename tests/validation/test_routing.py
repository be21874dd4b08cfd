"""Whether experts are the same, by hand and against sets."""

from __future__ import annotations

import torch

from glmexport.validation.routing import Routes, routing_agreement


def routes(*parts: list[list[int]], layer: int = 3) -> Routes:
    found = Routes()
    for part in parts:
        found.add(layer, torch.tensor(part))
    return found


def test_by_hand() -> None:
    """Of three positions one goes to the same two experts in another order, one keeps one, and one none."""
    (row,) = routing_agreement(routes([[4, 1], [2, 3]], [[5, 6]]), routes([[1, 4]], [[3, 7], [0, 1]]))
    assert (row.layer, row.positions, row.same_set, row.same_experts) == (3, 3, 1 / 3, 3 / 6)


def test_against_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(50, 16, generator=generator).topk(4).indices for _ in range(2))
    (row,) = routing_agreement(routes(before.tolist()), routes(after.tolist()))
    pairs = [(set(a), set(b)) for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    assert row.same_set == sum(a == b for a, b in pairs) / 50
    assert row.same_experts == sum(len(a & b) for a, b in pairs) / 200


def test_no_experts_no_rows() -> None:
    assert routing_agreement(Routes(), Routes()) == ()
