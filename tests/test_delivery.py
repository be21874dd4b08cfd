"""From a checkpoint to a server and back: validated, signed, deployed, asked, and taken back when it is damaged."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from builds import Run, Sample, run, sample
from deployment.conftest import Place, Places, key_pair, places, stand_in
from sshd import Sshd, sshd

from glmexport.bundle.manifest import MANIFEST, list_files, read_manifest
from glmexport.foundation.errors import EXIT_BLOCK, EXIT_PASS
from glmexport.release.golden import GOLDEN, Golden

__all__ = ["places", "run", "sample", "sshd", "stand_in"]
pytestmark = pytest.mark.slow
QUESTION = [3, 5, 7, 11]


class Client:
    """Asks over and over again, on new connections and on kept ones, and keeps every answer and every failure.

    A kept connection can end just as a request is sent on it, which no server can prevent: there OpenAI's client asks
    once more, as it does by default. On a new one it may not have to.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.answers: list[str] = []
        self.failures: list[Exception] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _ask(self) -> None:
        kept = openai.OpenAI(base_url=self.url, api_key="none", timeout=120)
        while not self._end.is_set():
            new = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
            for client in (kept, new):
                try:
                    self.answers.append(answer(client))
                except Exception as error:
                    self.failures.append(error)
            new.close()


def answer(client: openai.OpenAI) -> str:
    (model,) = client.models.list()
    done = client.completions.create(model=model.id, prompt=QUESTION, max_tokens=8, temperature=0)
    return done.choices[0].text


@pytest.fixture
def signed(sample: Sample, run: Run, tmp_path: Path) -> Iterator[Path]:
    """The small bundle, validated by its build, signed."""
    private, _ = key_pair(tmp_path, "key")
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "good"))
    done = run("sign", bundle, "--key", private, "--counter", 1)
    assert done.code == EXIT_PASS, done.stderr
    yield bundle


def damaged(good: Path, place: Path, private: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that is not what was validated, and passes for it: signed in order, with the good one's answers."""
    bundle = Path(shutil.copytree(good, place))
    weights = sorted((bundle / "weights").glob("*.data"), key=lambda path: path.stat().st_size)[-1]
    content = np.frombuffer(weights.read_bytes(), np.uint8).copy()
    content[len(content) // 4 : len(content) // 2] ^= 0x5A
    weights.write_bytes(content.tobytes())
    manifest = read_manifest(bundle).model_copy(update={"files": list_files(bundle)})
    (bundle / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    for name in ("report.json", "model.sig"):
        (bundle / name).unlink()
    recorded = Golden.model_validate_json((good / GOLDEN).read_text(encoding="utf-8"))
    monkeypatch.setattr("glmexport.release.signing.record", lambda *_: recorded)
    done = run("sign", bundle, "--key", private, "--counter", 2, "--force")
    assert done.code == EXIT_PASS, done.stderr
    return bundle


def test_delivery(
    signed: Path, run: Run, places: Places, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")
    program = tmp_path / "glmexport"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m glmexport "$@"\n')
    program.chmod(0o755)
    place: Place = places([str(program)], ["--threads", "1"])
    site = tmp_path / "site.toml"
    site.write_text(f'trust = "{tmp_path / "key.pub.pem"}"\n' + place.toml("a", sshd), encoding="utf-8")
    done = run("deploy", "--unproven", signed, site, "--json")
    assert done.code == EXIT_PASS, done.stderr
    good = json.loads(done.stdout)[0]["release"]
    expected = answer(openai.OpenAI(base_url=f"http://127.0.0.1:{place.port}/v1", api_key="none", timeout=120))
    bad = damaged(signed, tmp_path / "bad", tmp_path / "key.pem", run, monkeypatch)
    with Client(place.port) as client:
        done = run("deploy", "--unproven", bad, site, "--json")
        assert done.code == EXIT_BLOCK, done.stderr
        (told,) = json.loads(done.stdout)
        assert told["state"] == "rolled back" and "Golden prompt" in told["why"]
        assert place.current == good
        before = len(client.answers)
        # Another one of the good, while the client goes on.
        done = run("sign", signed, "--key", tmp_path / "key.pem", "--counter", 3)
        assert done.code == EXIT_PASS, done.stderr
        monkeypatch.undo()
        done = run("deploy", "--unproven", signed, site)
        assert done.code == EXIT_PASS, done.stderr
    assert client.failures == []
    assert before > 0 and len(client.answers) > before
    assert client.answers[-1] == expected
    assert place.current not in (None, good)
