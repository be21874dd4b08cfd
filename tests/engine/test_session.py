"""A bundle's sessions have the settings of its target, in every loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builds import TARGET, Sample
from models import FAMILY, write_checkpoint

from glmexport.architecture.description import Architecture
from glmexport.assembly.genai import loop_config
from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import LoopConfig
from glmexport.bundle.manifest import read_manifest
from glmexport.bundle.names import SCORING
from glmexport.engine.scoring import ScoringSession
from glmexport.engine.session import open_session
from glmexport.foundation.progress import Silent
from glmexport.foundation.target import Provider, SessionOptions, Target, open_target
from glmexport.validation.runtimes import Loaded, Round, RuntimeRequest
from glmexport.validation.speed import Worker
from glmexport.workflows.original import Original

ENTRY = "session.intra_op.allow_spinning"


@pytest.fixture(scope="module")
def tuned() -> Target:
    return open_target(TARGET).model_copy(update={"session": SessionOptions(threads=3, config={ENTRY: "0"})})


def described(directory: Path, family: str, **changes: Any) -> Architecture:
    write_checkpoint(directory, family, **changes)
    return Original.open(str(directory), Silent()).architecture


def test_entries_reach_the_session(sample: Sample, tuned: Target) -> None:
    provider = Provider(name="CPUExecutionProvider")
    session = open_session(sample.bundle / SCORING, provider, 1, config={ENTRY: "0"})
    assert session.get_session_options().get_session_config_entry(ENTRY) == "0"
    manifest = read_manifest(sample.bundle).model_copy(update={"target": tuned})
    scoring = ScoringSession(Bundle(sample.bundle, manifest), 1)
    assert scoring.session.get_session_options().get_session_config_entry(ENTRY) == "0"


def test_both_loops_are_told(tuned: Target, tmp_path: Path) -> None:
    name, config = loop_config(described(tmp_path / "heads", "glm4"), tuned)
    options = config["model"]["decoder"]["session_options"]
    assert name == "genai_config.json" and options["intra_op_num_threads"] == 3 and options[ENTRY] == "0"
    latent = described(tmp_path / "latent", "glm4_moe_lite", **FAMILY["glm4_moe_lite"])
    name, config = loop_config(latent, tuned)
    assert name == "loop.json" and LoopConfig.model_validate(config).session == tuned.session


def test_a_target_without_settings_changes_nothing(sample: Sample) -> None:
    """Bundles of before there were any stay the same, byte for byte."""
    config = json.loads((sample.bundle / "genai_config.json").read_text(encoding="utf-8"))
    assert set(config["model"]["decoder"]["session_options"]) == {"log_id", "provider_options"}


def test_a_shorter_prompt_on_request(sample: Sample) -> None:
    request = RuntimeRequest(
        runtime="onnxruntime-genai",
        directory=str(sample.bundle),
        prompt=tuple(range(100)),
        generated_tokens=3,
        threads=1,
    )
    with Worker(request) as worker:
        assert isinstance(worker.loaded, Loaded)
        for command in ("generate 5", "generate"):
            assert len(worker.ask(command, Round).steps_s) == 2
