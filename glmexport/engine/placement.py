"""The execution provider of every node, from the profile that ONNX Runtime writes of a short generation."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.greedy import greedy
from glmexport.engine.core.profile import GENERATED, PROMPT, profiled_nodes
from glmexport.engine.opening import open_engine
from glmexport.foundation.definition import Definition
from glmexport.results.performance import PlacedOperators, Placement

CPU = "CPUExecutionProvider"
#: Operators of which ONNX Runtime makes shapes and positions. Their nodes stay on the CPU beside another provider if
#: nothing but such numbers goes into them (GetCpuPreferredNodes in core/framework/fallback_cpu_capability.cc).
SHAPE_OPERATORS = frozenset({
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "GatherND", "Less", "Max", "Min",
    "Mul", "Range", "ReduceMax", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze",
    "Sub", "Unsqueeze", "Where",
})  # fmt: skip

class Node(Definition):
    """One node that ran."""

    name: str
    operator: str
    provider: str
    #: Whether it read and wrote only a few integers.
    small: bool


def profile(bundle: Bundle, prompt: Sequence[int], threads: int) -> tuple[Node, ...]:
    """Return every node that the bundle's loop ran for a few tokens, graph by graph, in the bundle's own settings."""
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(bundle, threads, profile=Path(folder) / "profile")
        for _ in greedy(engine, prompt[:PROMPT], GENERATED):
            pass
        # The profile is written when the session ends.
        engine.close()
        profiles = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).iterdir())]
    return tuple(node for events in profiles for node in nodes_of(events))


def nodes_of(events: Iterable[dict[str, Any]]) -> tuple[Node, ...]:
    """Return the nodes in the events of a profile, in the order in which they ran first."""
    return tuple(Node(**found) for found in profiled_nodes(events))


def placement(nodes: Sequence[Node], provider: str) -> Placement:
    """Return the ``nodes`` by the provider that ran them, compared with the target's ``provider``."""
    counts = Counter((node.provider, node.operator) for node in nodes)
    elsewhere = [node for node in nodes if node.provider != provider]
    shapes = [node for node in elsewhere if node.provider == CPU and node.operator in SHAPE_OPERATORS and node.small]
    return Placement(
        provider=provider,
        operators=tuple(
            PlacedOperators(provider=where, operator=operator, nodes=count)
            for (where, operator), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        ),
        on_purpose=tuple(f"{node.name} ({node.operator})" for node in shapes),
        unexpected=tuple(
            f"{node.name} ({node.operator}) on {node.provider}" for node in elsewhere if node not in shapes
        ),
    )
