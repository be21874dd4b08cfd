"""Shared fixtures. Modules beside this file (models) are importable from every test."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What a command measures on a machine that runs tests is no user's; all processes of a run have the same.
    _state = tempfile.TemporaryDirectory()
    atexit.register(_state.cleanup)
    os.environ["XDG_STATE_HOME"] = _state.name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parent))

if sys.platform == "linux" and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    # Tests side by side each have a core: threads of two libraries on two cores that both want wait for each other.
    _cores = psutil.Process().cpu_affinity()
    psutil.Process().cpu_affinity([_cores[int(worker.removeprefix("gw")) % len(_cores)]])

# How long anything takes on a busy machine is no property of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no core is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
