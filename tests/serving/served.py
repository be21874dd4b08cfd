"""``glmexport serve`` in a process of its own, and bundles that follow scripts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import openai
from builds import build, write_recipe
from scripted import write_scripted

FULL = 'summary = "Everything as it is"\n'
#: Longer than anything takes here, so that nothing waits for ever.
PATIENCE_S = 120


@dataclass
class Served:
    """A server process that is ready."""

    process: subprocess.Popen[str]
    url: str
    digest: str

    def client(self, **options: object) -> openai.OpenAI:
        """OpenAI's own client."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def http(self, **options: object) -> httpx.Client:
        """A client that sends what it is told."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def metric(self, name: str) -> float:
        """A counter's value."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def stop(self) -> int:
        """End it in order; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        with self.process:
            return self.process.wait(PATIENCE_S)


def start(bundle: Path, *arguments: object, **options: object) -> Served:
    """``glmexport serve`` in a process of its own, once it is ready."""
    command = [sys.executable, "-m", "glmexport", "serve", bundle, "--port", 0, "--threads", 1, "--json", *arguments]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, **options)
    return ready(process)


def ready(process: subprocess.Popen[str]) -> Served:
    """What a process says once it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the server ended with {process.wait(PATIENCE_S)}: {process.stderr and process.stderr.read()}"
    said = json.loads(line)
    return Served(process, said["url"], said["digest"])


@cache
def scripted_bundle(base: Path, model_type: str) -> Path:
    """The bundle of a checkpoint that follows scripts."""
    directory = base / f"scripted-{model_type}"
    write_scripted(directory / "checkpoint", model_type)
    (built,) = build(directory / "checkpoint", directory / "bundle", write_recipe(directory, FULL))
    return built.directory
