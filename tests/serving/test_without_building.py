"""Bundles are served, run, verified, deployed and compared where nothing that only builds can be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from builds import Sample, sample
from deployment.conftest import Places, Releases, places, releases, stand_in, write_site
from served import scripted_bundle, start
from sshd import Sshd, sshd
from test_structure import BUILDING

pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")

__all__ = ["places", "releases", "sample", "sshd", "stand_in"]

#: Every Python process below reads it first, the processes of the server and the deployed server included.
SITECUSTOMIZE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(BUILDING)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted glm4 bundle, built where nothing is absent."""
    return scripted_bundle(tmp_path_factory.getbasetemp(), "glm4")


@pytest.fixture(autouse=True)
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes that are started from now on lack what only building needs."""
    folder = tmp_path / "absent"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    path = os.pathsep.join((str(folder), *filter(None, [os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PYTHONPATH", path)


def called(*arguments: object, code: int = 0) -> str:
    """Return what the command line prints on stdout."""
    command = [sys.executable, "-m", "glmexport", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_libraries_are_absent() -> None:
    for name in BUILDING:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        assert done.returncode and f"No module named '{name}'" in done.stderr


def test_a_chat_with_tools_and_json(scripted: Path) -> None:
    server = start(scripted, "--name", "tiny")
    try:
        with server.client() as client:
            asked: dict[str, Any] = {"model": "tiny", "temperature": 0}
            says = [{"role": "user", "content": "Weather#"}]
            choice = client.chat.completions.create(**asked, messages=says, tools=[TOOL]).choices[0]
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert json.loads(call.function.arguments) == {"city": 'Zurich {"a": 1}', "days": 3}
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
            says = [{"role": "user", "content": "Hello"}]
            choice = client.chat.completions.create(
                **asked, messages=says, response_format=form, max_tokens=40
            ).choices[0]
            # Random weights like white space, of which the grammar allows any amount.
            said = "".join((choice.message.content or "").split())
            assert said and any(f'{{"answer":"{one}"}}'.startswith(said) for one in ("yes", "no"))
    finally:
        assert server.stop() == 0


def test_the_verbs_of_running(sample: Sample, releases: Releases, tmp_path: Path) -> None:
    assert "serve" in called("--help")
    assert "Usage" in called("build", "--help")
    called("run", sample.bundle, "-p", "Hello", "--max-tokens", "4")
    assert json.loads(called("verify", releases(1), "--key", releases.public, "--json"))
    called("run", releases(1), "-p", "Hello", "--max-tokens", "4", "--key", releases.public)
    compared = json.loads(called("compare", sample.bundle, sample.bundle, "--json"))
    assert compared["changes"] and not [change for change in compared["changes"] if change["worse"]]
    called("report", "render", sample.bundle, "-o", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
    assert json.loads(called("targets", "list", "--json"))["targets"]
    assert json.loads(called("targets", "probe", "--json"))["host"]
    called("targets", "check", sample.bundle)
    called("package", releases(1), "--oci", tmp_path / "layout")
    called("unpack", tmp_path / "layout", "--key", releases.public, "-o", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "model.onnx").is_file()
    shutil.copytree(sample.bundle, tmp_path / "signed")
    called("sign", tmp_path / "signed", "--key", releases.private, "--counter", "3")
    assert json.loads(called("verify", tmp_path / "signed", "--key", releases.public, "--json"))


def test_a_deployment_and_what_it_serves(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    program = tmp_path / "glmexport"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m glmexport "$@"\n')
    program.chmod(0o755)
    place = places([str(program)], ["--threads", "1"])
    write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    (told,) = json.loads(called("deploy", "--unproven", releases(1), tmp_path / "site.toml", "--json"))
    assert told["state"] == "confirmed", told
    called("status", tmp_path / "site.toml")
    with httpx.Client(base_url=f"http://127.0.0.1:{place.port}", timeout=120) as client:
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"]
