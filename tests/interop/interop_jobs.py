"""What GPTQModel makes of the demo checkpoint, and what it and transformers compute with ours: once a test run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import glmexport.workflows.build
from glmexport.bundle.bundle import Bundle
from glmexport.demo import demo_checkpoint
from glmexport.foundation.progress import Silent
from glmexport.workflows.convert import convert_to_gptq
from glmexport.workflows.original import Original

VARIABLE = "GLMEXPORT_GPTQMODEL_PYTHON"
DRIVER = Path(__file__).with_name("gptqmodel_driver.py")
IDS = [8175, 8176, *range(100, 1000, 75)]
#: GPTQModel's settings of the checkpoints that it quantizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "asymmetric-g128": {"bits": 4, "group_size": 128, "sym": False},
    "symmetric-g128": {"bits": 4, "group_size": 128, "sym": True},
    "asymmetric-g32": {"bits": 4, "group_size": 32, "sym": False},
    "version-2": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "act-order": {"bits": 4, "group_size": 128, "sym": True, "desc_act": True},
}
OURS = {"rtn-w4g128": "w4g128", "rtn-w4g32": "w4g32", "symmetric": "w4g32-sym"}
SYMMETRIC = """summary = "Symmetric"
[linears]
bits = 4
group_size = 32
symmetric = true
[solver]
method = "round-to-nearest"
"""


@pytest.fixture(scope="session")
def gptqmodel() -> Path:
    """The interpreter; the tests are skipped without one."""
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"set {VARIABLE} to a Python interpreter that has gptqmodel 7.6, optimum and transformers 5.23")
    return Path(path)


@pytest.fixture(scope="session")
def place(gptqmodel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``theirs/NAME``, checkpoints by GPTQModel; ``ours/NAME``, our bundles; ``written/NAME-LAYOUT``, checkpoints
    written from those; and ``dumps``, what the libraries compute with all of them.
    """
    place = tmp_path_factory.mktemp("interop")
    (place / "symmetric.toml").write_text(SYMMETRIC, encoding="utf-8")
    jobs: list[dict[str, Any]] = []
    for name, settings in SETTINGS.items():
        theirs = str(place / "theirs" / name)
        jobs.append({"quantize": str(demo_checkpoint()), "settings": settings, "to": theirs})
        if name != "act-order":
            jobs.append(_dump(place, theirs, "gptqmodel", f"theirs-{name}"))
    original = Original.open("demo", Silent())
    for recipe in OURS:
        bundle = build_unvalidated(demo_checkpoint(), place / "ours" / recipe, _recipe(place, recipe))
        for library in ("gptqmodel", "transformers"):
            written = place / "written" / f"{recipe}-{library}"
            layout: Any = library
            convert_to_gptq(Bundle.open(bundle), original, written, layout=layout, force=False, progress=Silent())
            jobs.append(_dump(place, str(written), library, f"{recipe}-{library}"))
    (place / "dumps").mkdir()
    (place / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    settings = {
        "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"
    }  # fmt: skip
    process = subprocess.run(
        [gptqmodel, DRIVER, place / "jobs.json"],
        # It writes its logs there.
        cwd=place,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return place


def build_unvalidated(checkpoint: Path, bundle: Path, recipe: str) -> Path:
    """A bundle; what it computes is not measured."""
    from builds import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glmexport.workflows.build, "measure_and_report", lambda *_: None)
        build(checkpoint, bundle, recipe)
    return bundle


def _recipe(place: Path, name: str) -> str:
    return str(place / "symmetric.toml") if name == "symmetric" else name


def _dump(place: Path, checkpoint: str, library: str, name: str) -> dict[str, Any]:
    return {"dump": checkpoint, "library": library, "ids": IDS, "to": str(place / "dumps" / f"{name}.safetensors")}
