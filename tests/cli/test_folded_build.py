"""A checkpoint with uneven channels through the command line: the folds are in the bundle and in its conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from builds import RECIPE, Run, build, write_recipe, write_target
from models import write_uneven
from torch import Tensor

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.bundle.names import FOLDS
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.engine.scoring import ScoringSession
from glmexport.foundation.progress import Silent
from glmexport.reference.describe import describe
from glmexport.reference.reference import Reference
from glmexport.workflows.original import Original


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    architecture = describe(checkpoint)
    reference = Reference(checkpoint, architecture)
    hidden = reference.embed(ids)[None]
    for layer in architecture.layers:
        hidden = reference.block(layer).forward(hidden, reference.position_embeddings(len(ids)))
    return reference.logits(reference.final_norm(hidden))[0]


def test_the_bundle_and_a_checkpoint_of_it(tmp_path: Path, run: Run) -> None:
    checkpoint = write_uneven(tmp_path / "checkpoint", num_hidden_layers=2)
    target = write_target(tmp_path, {"accuracy_level = 4": "accuracy_level = 0"}, "exact")
    (built,) = build(tmp_path / "checkpoint", tmp_path / "bundle", write_recipe(tmp_path, RECIPE), (str(target),))
    manifest = read_manifest(built.directory)
    assert FOLDS in {file.path for file in manifest.files}
    layers = describe(checkpoint).layers
    assert {record.key for record in manifest.matrices if record.folded} == {
        linear.weight for layer in layers for linear in layer.linears
    }
    ids = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0))
    original = logits(checkpoint, ids)
    bundle = torch.from_numpy(ScoringSession(Bundle(built.directory, manifest), 1).logits(ids.numpy()))
    # Without the norms' part of the folds this would be above 1.
    assert (bundle - original).norm() < 0.2 * original.norm()
    linears, _, runtime = built.report.shares
    assert linears.kl_mean_nats < 0.05 and abs(runtime.kl_mean_nats) < 1e-6

    converted = tmp_path / "gptq"
    outcome = run("convert", built.directory, "--against", tmp_path / "checkpoint", "--to", "gptq", "-o", converted)
    assert outcome.code == 0, outcome.stderr
    written = Original.open(str(converted), Silent()).checkpoint
    # The bundle's embedding and head are rounded to 8 bits; a GPTQ checkpoint has them in full precision.
    assert (logits(written, ids) - bundle).norm() < 0.03 * original.norm()
    norm = layers[0].mlp_norm.weight
    assert not torch.equal(written.read(norm), checkpoint.read(norm))
