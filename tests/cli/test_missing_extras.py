"""Packages that are not installed: one line that names them and one that installs them, wherever they are needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from builds import Sample

from glmexport.foundation.errors import EXIT_MACHINE
from glmexport.foundation.extras import EXTRAS, missing_package

#: Has every optional package missing, and runs command lines one after the other: importing the rest takes seconds.
DRIVER = """
import io, json, runpy, sys
from contextlib import redirect_stderr

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in set(BLOCKED):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED, LINES = json.loads(sys.argv[1])
sys.meta_path.insert(0, Missing())
told = []
for line in LINES:
    sys.argv, said, code = line, io.StringIO(), None
    with redirect_stderr(said):
        try:
            runpy.run_module(line[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            said.write(f"Traceback {type(error).__name__}: {error}")
    told.append([code, said.getvalue()])
print(json.dumps(told))
"""


class Told(NamedTuple):
    code: int | None
    text: str


def outcomes(blocked: list[str], lines: list[list[str]], place: Path) -> list[Told]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([blocked, lines])],
        capture_output=True, text=True, timeout=240, check=True, cwd=place, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    return [Told(*each) for each in json.loads(done.stdout.splitlines()[-1])]


def test_every_verb_that_needs_one(sample: Sample, tmp_path: Path) -> None:
    bundle, checkpoint = str(sample.bundle), str(sample.checkpoint)
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN PRIVATE KEY-----\n", encoding="utf-8")
    site = tmp_path / "site.toml"
    site.write_text(
        f'trust = "{key}"\n[servers.one]\nat = "ssh://nobody@127.0.0.1:1"\nroot = "/srv/x"\n', encoding="utf-8"
    )
    wanted: dict[str, list[list[str]]] = {
        "lm-eval": [["glmexport.lm_eval", "--model", "glmexport", "--tasks", "x"]],
        "serve": [["glmexport", "serve", bundle]],
        "sign": [["glmexport", "sign", bundle, "--key", str(key), "--counter", "1"]],
        "devices": [
            ["glmexport", "validate", bundle, "--against", checkpoint, "--device", "ssh://nobody@127.0.0.1:1"],
        ],
        "browser": [["glmexport", "validate", bundle, "--against", checkpoint, "--device", "browser"]],
        "deploy": [["glmexport", verb, str(site)] for verb in ("status", "rollback", "prune")],
    }
    lines = [(extra, line) for extra, each in wanted.items() for line in each]
    others = sorted(name for name, extra in EXTRAS.items() if extra != "build")
    told = outcomes(others, [line for _, line in lines], tmp_path)
    for (extra, line), outcome in zip(lines, told, strict=True):
        assert outcome.code == EXIT_MACHINE, (line, outcome)
        assert "Traceback" not in outcome.text, (line, outcome)
        message, step = outcome.text[outcome.text.index("ERROR ") :].splitlines()
        assert f"pip install 'glmexport[{extra}]'" in step, (line, outcome)
        assert not re.search(r"\n.*\n.*\n", message)


def test_building_says_how_it_is_installed(sample: Sample, tmp_path: Path) -> None:
    """In one line, and for a machine without a GPU too; nothing is written."""
    bundle, checkpoint, output = str(sample.bundle), str(sample.checkpoint), str(tmp_path / "output")
    lines = [
        ["glmexport", *line]
        for line in (
            ("build", checkpoint, "--target", "x86-avx2", "-o", output),
            ("validate", bundle, "--against", checkpoint),
            ("validate", bundle, "--against", checkpoint, "--plan"),
            ("tune", checkpoint, "-o", output),
            ("convert", bundle, "--to", "gptq", "--against", checkpoint, "-o", output),
            ("inspect", checkpoint),
            ("reference", checkpoint, "-o", output),
            ("targets", "show", "x86-avx2"),
        )
    ]
    building = sorted(name for name, extra in EXTRAS.items() if extra == "build")
    assert {"torch", "transformers", "scipy", "onnx", "onnx_ir", "safetensors"} <= {*building}
    for line, outcome in zip(lines, outcomes(building, lines, tmp_path), strict=True):
        assert outcome.code == EXIT_MACHINE, (line, outcome)
        message, step = outcome.text[outcome.text.index("ERROR ") :].splitlines()
        assert message.endswith(" is not installed."), (line, outcome)
        assert "pip install 'glmexport[build]'" in step and "pip install torch --index-url" in step, (line, outcome)
    assert not Path(output).exists()


@pytest.mark.parametrize("blocked", ["uvicorn", "prometheus_client", "starlette"])
def test_each_part_of_the_server_is_called_by_its_name(blocked: str, sample: Sample, tmp_path: Path) -> None:
    (told,) = outcomes([blocked], [["glmexport", "serve", str(sample.bundle)]], tmp_path)
    assert told.code == EXIT_MACHINE and blocked in told.text and "pip install 'glmexport[serve]'" in told.text


def test_the_table_is_that_of_the_project() -> None:
    """Every package of an extra is brought by the extra that is named for it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        extra: {normal(re.split(r"[<>=\[]", each)[0]) for each in packages}
        for extra, packages in project["optional-dependencies"].items()
    }
    distributions = packages_distributions()
    for module, extra in EXTRAS.items():
        brought = {normal(name) for name in distributions.get(module, [module])}
        assert brought & extras[extra], (module, extra)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_ours_or_pythons_is_a_bug() -> None:
    for name in ("glmexport.absent", "json.absent", ""):
        assert missing_package(ModuleNotFoundError("absent", name=name)) is None
    other = missing_package(ModuleNotFoundError("absent", name="sentencepiece.x"))
    assert other is not None and "sentencepiece is not installed" in other.message
    old = missing_package(ImportError("cannot import name 'x'", name="lm_eval.api.registry"))
    assert old is not None and "lm_eval cannot be used here" in old.message and "[lm-eval]" in old.next_step
