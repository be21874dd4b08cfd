"""The layer that predicts further ahead is rounded behind the walk, part by part."""

from __future__ import annotations

from pathlib import Path

import torch
from builds import FORMATS, write_recipe
from models import write_predicting
from predicting import PREDICTING

from glmexport.architecture.description import Linear
from glmexport.architecture.experts import MixtureOfExperts
from glmexport.architecture.token_prediction import TokenPrediction
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import open_recipe
from glmexport.quantization.job import QuantizationJob
from glmexport.quantization.memory import plan_memory
from glmexport.quantization.nearest import round_to_nearest
from glmexport.quantization.quantized_model import QuantizedModel
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.walk import walk
from glmexport.workflows.original import Original

SHARED = "\n[shared]\nbits = 4\ngroup_size = 16\n"


def test_what_was_lost_alone_is_done_again(tmp_path: Path) -> None:
    family, changes = PREDICTING["glm4_moe_lite"]
    write_predicting(tmp_path / "checkpoint", family, num_hidden_layers=2, **changes)
    original = Original.open(str(tmp_path / "checkpoint"), Silent()).sharing_tables()
    text = f'summary = "Rounded"\n{FORMATS}{SHARED}\n[solver]\nmethod = "round-to-nearest"\nscale_search = false\n'
    recipe = open_recipe(str(write_recipe(tmp_path, text)))
    memory = plan_memory(original.architecture, recipe, None)
    work = WorkDirectory(tmp_path / "work", {})

    def walked() -> QuantizedModel:
        job = QuantizationJob(original.checkpoint, original.architecture, recipe, None, work, memory, Silent())
        return walk(job)

    first = walked()
    assert first.draft_parts[0] == "block_002" and "block_002.expert_015" in first.draft_parts
    assert not set(first.draft_parts) & set(first.parts)
    records = first.draft_records
    draft = original.architecture.token_prediction
    assert draft is not None and [record.key for record in records] == [linear.weight for linear in _ordered(draft)]
    assert {(record.bits, record.group_size) for record in records} == {(4, 16)}
    projection = work.linear("block_002", draft.projection.weight)
    expected = round_to_nearest(original.checkpoint.read(draft.projection.weight), projection.form)
    assert torch.equal(projection.codes, expected.codes)
    times = {path.name: path.stat().st_mtime_ns for path in work.path.glob("*.safetensors")}
    work.forget("block_002.expert_003")
    again = walked()
    assert again.draft_records == records
    changed = {path.name for path in work.path.glob("*.safetensors") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"block_002.expert_003.safetensors"}


def _ordered(draft: TokenPrediction) -> list[Linear]:
    """As they are committed: what every token passes, then the experts, the shared one first."""
    mixture = draft.layer.mlp
    assert isinstance(mixture, MixtureOfExperts)
    return [*(linear for linear in draft.matrices if linear not in mixture.linears), *mixture.linears]
