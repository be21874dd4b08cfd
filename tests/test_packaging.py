"""The wheels have everything that a build needs, once, and run from where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

import glmexport

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(glmexport.__file__).parent

pytestmark = pytest.mark.slow


def built(source: Path, out: Path) -> Path:
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(PACKAGE / "demo", tmp_path_factory.mktemp("demo_wheel"))


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
    for kind in ("*.py", "report/templates/*", "report/*.json", "devices/browser/*.*", "serving/*.onnx"):
        found = {f"glmexport/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob(kind)}
        assert found, kind
        expected |= found
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}


def test_the_checkpoint_has_a_wheel_of_its_own(demo_wheel: Path) -> None:
    with zipfile.ZipFile(demo_wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    checkpoint = PACKAGE / "demo" / "checkpoint"
    assert files == {f"glmexport_demo/checkpoint/{path.name}": path.read_bytes() for path in checkpoint.iterdir()}


def test_the_wheel_has_nothing_twice_and_little_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    digests = Counter(sha256(data).hexdigest() for data in contents.values() if data)
    twice = [name for name, data in contents.items() if digests[sha256(data).hexdigest()] > 1 and data]
    assert not twice
    assert sum(map(len, contents.values())) < 4 << 20


def test_the_installed_copy_runs(wheel: Path, demo_wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(installed)]
    call([sys.executable, "-m", "pip", "install", *options, str(wheel), str(demo_wheel)], tmp_path)
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
