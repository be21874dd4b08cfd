"""The wheel, in environments of its own with nothing but what an extra asks for, does the main jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest
import torch
from builds import FORMATS, Sample, sample

from benchmarks.footprint import SIZES

__all__ = ["sample"]
ROOT = Path(__file__).parents[1]

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


def environment(place: Path, extra: str, *others: str) -> Path:
    """Make an environment with the wheel and an extra, and what else is named; return its folder of programs."""
    wheels = place / "wheels"
    for project in (ROOT, ROOT / "glmexport" / "demo"):
        command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, project)
        built = run(*command, cwd=place)
        assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("glmexport-0*.whl")
    home = place / "environment"
    venv.create(home, with_pip=True)
    for package in (*others, f"{wheel}[{extra}]"):
        asked = ("--quiet", "--find-links", wheels, package)
        installed = run(home / "bin" / "python", "-m", "pip", "install", *asked, cwd=place)
        assert installed.returncode == 0, installed.stderr
    return home / "bin"


@pytest.mark.release
def test_a_bundle_is_served_by_the_extra_serve_alone(sample: Sample, tmp_path: Path) -> None:
    programs = environment(tmp_path, "serve")
    absent = run(programs / "python", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in absent.stderr
    sizes = run(programs / "python", "-c", SIZES, "glmexport[serve]", cwd=tmp_path)
    assert sum(json.loads(sizes.stdout).values()) <= 260 << 20, sizes
    said = run(programs / "glmexport", "run", sample.bundle, "-p", "Hello", "--max-tokens", "4", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    lacking = run(programs / "glmexport", "build", "demo", cwd=tmp_path)
    assert "pip install 'glmexport[build]'" in lacking.stderr
    command = [programs / "glmexport", "serve", sample.bundle, "--port", 0, "--json"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            asked: dict[str, object] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
            tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
            for options in ({}, {"tools": [tool]}, {"response_format": form}):
                answer = httpx.post(f"{url}/v1/chat/completions", json=asked | options, timeout=120)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"]
        finally:
            server.terminate()


@pytest.mark.release
def test_the_wheel_builds_the_demo_in_a_fresh_environment(tmp_path: Path) -> None:
    # The torch of this environment, so that a machine without a GPU does not fetch CUDA.
    home = environment(tmp_path, "demo", f"torch=={torch.__version__.split('+')[0]}").parent
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
