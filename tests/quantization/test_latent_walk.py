"""Latent attention in the walk: every tap measured on what its linears read, and GPTQ better than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import LATENT
from tiny import NEAREST, RECIPE, Model

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.reference.reference import Reference

SIZES = {**LATENT, "num_attention_heads": 4, "num_key_value_heads": 4}
INDEXED = {"index_topk": 64, "index_n_heads": 32, "index_head_dim": 24, "indexer_types": ["full", "shared"]}


@pytest.fixture(scope="module", params=["glm4_moe_lite", "glm_moe_dsa"])
def model(request, tmp_path_factory) -> Model:
    changes: dict[str, Any] = {"model_type": request.param, **SIZES}
    return Model(tmp_path_factory.mktemp("model"), **changes, **(INDEXED if "dsa" in request.param else {}))


def test_gptq_beats_rounding_everywhere(model: Model, tmp_path: Path) -> None:
    """At every linear by its own account, and in what the attention of the last layer adds to the stream."""
    walks = [model.walked(tmp_path / recipe.name, recipe) for recipe in (RECIPE, NEAREST)]
    records = walks[0].records
    linears = [record for record in records if record.part not in ("embedding", "lm_head")]
    assert {record.part for record in linears} == {"q_a", "kv_a", "q_b", "kv_b", "o", "gate_up", "down"}
    for record in linears:
        assert record.fallback is None
        assert record.relative_error is not None and record.round_to_nearest_error is not None
        assert record.relative_error < record.round_to_nearest_error
    # The indexer stays as it is.
    assert {record.key for record in records} == model.matrices()

    ids = model.calibration.ids[:8]
    positions = Reference(model.checkpoint, model.architecture).position_embeddings(ids.shape[1])

    def hidden(checkpoint: Checkpoint, walk: QuantizedModel | None) -> torch.Tensor:
        """Behind the last block, from the same embeddings."""
        weights = None if walk is None else walk.weights()

        def substitute(key: str) -> torch.Tensor | None:
            return weights.quantized(key).dequantize() if weights and weights.form(key) else None

        reference = Reference(checkpoint, model.architecture)
        stream = reference.embed(ids)
        for layer in model.architecture.layers:
            stream = reference.block(layer, substitute).forward(stream, positions)
        return stream

    whole = hidden(model.checkpoint, None)
    solved, rounded = ((hidden(walk.job.checkpoint, walk) - whole).norm() for walk in walks)
    assert solved < 0.9 * rounded
