"""The wheel has everything that a build needs and nothing else, and runs from where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import glmexport

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(glmexport.__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)], out)
    (path,) = out.glob("*.whl")
    return path


def call(command: list[str], where: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=where, env=inherited | environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped(folder: str, pattern: str) -> set[str]:
    """Files of the checkout that belong into the wheel, under the names that they have there."""
    found = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).glob(pattern)]
    assert found, folder
    return {f"glmexport/_data/{name}" for name in found}


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = shipped("targets", "*.toml") | shipped("calibration/recipes", "*.toml")
    expected |= shipped("calibration/corpora", "*")
    for kind in ("*.py", "demo/checkpoint/*", "report/templates/*", "report/*.json", "devices/browser/*.*"):
        found = {f"glmexport/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob(kind)}
        assert found, kind
        expected |= found
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}


def test_the_installed_copy_runs(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(installed)]
    call([sys.executable, "-m", "pip", "install", *options, str(wheel)], tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str) -> str:
        return call([sys.executable, *arguments], elsewhere, PYTHONPATH=str(installed), HF_HUB_OFFLINE="1")

    assert Path(run("-c", "import glmexport; print(glmexport.__file__)").strip()).parent == installed / "glmexport"
    listed = json.loads(run("-m", "glmexport", "targets", "list", "--json"))
    assert listed["targets"] == sorted(path.stem for path in (REPOSITORY / "targets").glob("*.toml"))
    described = json.loads(run("-m", "glmexport", "inspect", "demo", "--json", "--threads", "1"))
    assert described["family"] == "glm4"
    assert Path(described["path"]).is_relative_to(installed)
    assert {row["target"] for row in described["estimates"]} == set(listed["targets"])
    assert not list(elsewhere.iterdir())
