"""The wheel, in an environment of its own with nothing but what it asks for, does the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from builds import FORMATS

#: Less text than the shipped recipe takes; everything else is as shipped.
RECIPE = f"""
summary = "w4g32 on a little text"
{FORMATS}
[calibration]
tokens = 8192
sequence_length = 256
[calibration.quota]
zh = 1
en = 1
ja = 1
"""


#: So little text leaves more of the demo's close calls decided otherwise than the target's gates allow.
POLICY = """
kl_mean_nats = 0.05
ln_perplexity_ratio = 0.03
top1_agreement = 0.8
minimum_positions = 500

[behaviour]
answers = 0.3
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.release
def test_the_wheel_builds_the_demo_in_a_fresh_environment(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    wheels = tmp_path / "wheels"
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, root, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("*.whl")
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # The torch of this environment, so that a machine without a GPU does not fetch CUDA.
    for package in (f"torch=={torch.__version__.split('+')[0]}", wheel):
        installed = run(python, "-m", "pip", "install", "--quiet", package, cwd=tmp_path)
        assert installed.returncode == 0, installed.stderr
    (tmp_path / "little.toml").write_text(RECIPE)
    (tmp_path / "policy.toml").write_text(POLICY)
    bundle = tmp_path / "bundle"
    asked = ("--recipe", "little.toml", "--policy", "policy.toml", "-o", bundle, "--json")
    result = run(home / "bin" / "glmexport", "build", "demo", *asked, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (entry,) = json.loads(result.stdout)["bundles"]
    assert entry["report"]["verdict"] == "PASS"
    assert entry["bundle"] == str(bundle)
    assert (bundle / "report.html").is_file()
    assert "verdict  PASS" in result.stderr
    said = run(home / "bin" / "glmexport", "run", bundle, "-p", "Hello!", "--max-tokens", "24", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
