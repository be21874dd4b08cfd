"""The nodes and their providers in the profile that ONNX Runtime writes of a short generation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

#: Number of tokens of the prompt, and of generated ones: both shapes that the graph is run in.
PROMPT, GENERATED = 8, 3
#: Operators that read only the shape of their input.
_OF_ANYTHING = ("Shape", "Size")
_INTEGERS = frozenset(("int64", "int32", "uint64", "uint32", "bool"))
#: ONNX Runtime's own bound of a small tensor, in elements.
_SMALL = 100


def profiled_nodes(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the nodes of one graph in the ``events`` of its profile, in the order in which they ran first.

    Each has its ``name``, ``operator``, ``provider``, and ``small``, which says whether it read and wrote only a few
    integers.
    """
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") != "Node" or not facts.get("provider"):
            continue
        name = str(event["name"]).removesuffix("_kernel_time")
        # A node that is small with one token but not with several is not small.
        small = _small(facts) and found.get(name, {}).get("small", True)
        found[name] = {"name": name, "operator": facts["op_name"], "provider": facts["provider"], "small": small}
    return list(found.values())


def _small(facts: dict[str, Any]) -> bool:
    read = [] if facts["op_name"] in _OF_ANYTHING else facts.get("input_type_shape", [])
    tensors = [item for each in [*read, *facts.get("output_type_shape", [])] for item in each.items()]
    return all(kind in _INTEGERS and math.prod(shape) <= _SMALL for kind, shape in tensors)
