"""Scales folded between tensors: the model stays the same to the last bit, and rounding costs less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrices import generator
from models import write_uneven
from torch import Tensor

from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.fold import Fold, as_tensors, from_tensors
from glmexport.foundation.progress import Silent
from glmexport.foundation.recipe import Format
from glmexport.quantization.folding import choose_folds, fold_candidates
from glmexport.quantization.nearest import round_to_nearest
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference

W4G32 = Format(bits=4, group_size=32)
PREFIX = 1


def folds_of(checkpoint: Checkpoint, form: Format = W4G32) -> dict[str, Fold]:
    reference = Reference(checkpoint, describe(checkpoint))
    return choose_folds(reference, ids(), PREFIX, form, 4 * 24, Silent())


def ids() -> Tensor:
    return torch.randint(0, 250, (9, 24), generator=generator(0))


def logits(checkpoint: Checkpoint, rounded: Format | None = None) -> Tensor:
    """Of the whole model; with its linears rounded to nearest, if a format is given."""
    architecture = describe(checkpoint)
    reference = Reference(checkpoint, architecture)
    weights = {linear.weight for layer in architecture.layers for linear in layer.linears}

    def substitute(key: str) -> Tensor | None:
        if rounded is None or key not in weights:
            return None
        weight = checkpoint.read(key)
        return round_to_nearest(weight, rounded, torch.ones(weight.shape[1])).dequantize()

    hidden = reference.embed(ids())
    for layer in architecture.layers:
        hidden = reference.block(layer, substitute).forward(hidden, reference.position_embeddings(24))
    return reference.logits(reference.final_norm(hidden))


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_folded_model_is_the_same_to_the_last_bit(tmp_path: Path, family: str) -> None:
    checkpoint = write_uneven(tmp_path, family, spread=1.5)
    folds = folds_of(checkpoint)
    architecture = describe(checkpoint)
    linears = {linear.weight for layer in architecture.layers for linear in layer.linears}
    assert linears <= set(folds)
    folded = checkpoint.folded(folds)
    for key in folds:
        assert not torch.equal(folded.read(key), checkpoint.read(key))
        assert torch.equal(folds[key].undo(folded.read(key)), checkpoint.read(key))
    assert torch.equal(logits(folded), logits(checkpoint))
    assert folded.digest() == checkpoint.digest()


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_folds_save_what_uneven_channels_cost(tmp_path: Path, family: str) -> None:
    """Rounded to nearest, an uneven model is far from itself; folded, nearly as near as one with even channels."""
    even, odd = write_uneven(tmp_path / "even", family, 0.0), write_uneven(tmp_path / "odd", family, 1.5)
    whole = logits(even)
    torch.testing.assert_close(logits(odd), whole, atol=1e-4, rtol=1e-4)
    best, unfolded = ((logits(each, W4G32) - whole).norm() for each in (even, odd))
    folded = (logits(odd.folded(folds_of(odd)), W4G32) - whole).norm()
    assert unfolded > 2 * best
    assert folded < 1.3 * best


def test_even_channels_are_left_alone(tmp_path: Path) -> None:
    assert folds_of(write_uneven(tmp_path, "glm4", 0.0)) == {}


def test_channels_of_one_row_share_an_exponent(tmp_path: Path) -> None:
    """Query heads that read the same value head."""
    checkpoint = write_uneven(tmp_path, "glm4", spread=1.5)
    layer = describe(checkpoint).layers[0]
    attention = layer.attention
    columns = folds_of(checkpoint)[attention.output.weight].columns
    assert columns is not None
    by_head = columns.reshape(attention.kv_heads, attention.heads // attention.kv_heads, attention.head_dim)
    assert bool((by_head == by_head[:, :1]).all())
    assert columns.unique().numel() > 2


def test_candidates_by_hand() -> None:
    """s = (h / w^p)^(1 / (p + 2)): with p = 2 and h = 1 the square root of 1 / w, about the mean."""
    size = torch.tensor([1.0, 16.0, 1.0, 16.0])
    first = next(fold_candidates(torch.ones(4), size, torch.arange(4), None))
    assert first.tolist() == [1, -1, 1, -1]
    tied = next(fold_candidates(torch.ones(4), size, torch.tensor([0, 0, 1, 1]), None))
    assert tied.tolist() == [0, 0, 0, 0]
    limited = next(fold_candidates(torch.ones(4), size, torch.arange(4), torch.tensor([0.0, 5, 5, 5])))
    assert limited.tolist() == [0, -1, 1, -1]


def test_a_fold_of_some_rows_and_its_stored_form() -> None:
    fold = Fold(torch.tensor([1, -1, 0], dtype=torch.int8), torch.tensor([0, 2], dtype=torch.int8))
    whole = fold.apply(torch.ones(3, 2))
    assert whole.tolist() == [[2, 8], [0.5, 2], [1, 4]]
    assert torch.equal(fold.apply(torch.ones(2, 2), 1), whole[1:])
    assert fold.undo(whole).tolist() == torch.ones(3, 2).tolist()
    assert Fold(fold.rows).apply(torch.ones(3)).tolist() == [2, 0.5, 1]
    narrow = fold.apply(torch.ones(3, 2, dtype=torch.bfloat16))
    assert narrow.dtype == torch.bfloat16 and narrow.tolist() == [[2, 8], [0.5, 2], [1, 4]]
    again = from_tensors(as_tensors({"a.weight": fold, "b.bias": Fold(fold.rows)}))
    assert set(again) == {"a.weight", "b.bias"} and again["b.bias"].columns is None
    assert again["a.weight"].rows is not None and torch.equal(again["a.weight"].rows, fold.rows)
    assert from_tensors({}) == {}
