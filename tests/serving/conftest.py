"""One scripted bundle and one server in front of it for every module of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from builds import run
from served import Served, scripted_bundle, start

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.sequence import Engine
from glmexport.engine.opening import open_engine

__all__ = ["run"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted glm4 bundle."""
    return scripted_bundle(tmp_path_factory.getbasetemp(), "glm4")


@pytest.fixture(scope="module", params=["glm4", "glm4_moe_lite"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted bundle for each of the loops."""
    return scripted_bundle(tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    """The bundle in memory."""
    return open_engine(Bundle.open(directory), 1)


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    """A server of it."""
    server = start(bundle, "--name", "tiny", "--parallel", 4, "--head-s", 3)
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the server."""
    with served.client() as made:
        yield made
