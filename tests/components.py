"""What tests run bundles in and cannot bring along: a browser, and an emulated machine. Absent: a skip that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime
import pytest

from glmexport.devices.emulated import default_sysroot, prepare
from glmexport.devices.web_runtime import ARCHIVE, web_runtime
from glmexport.foundation.cache import cache_folder
from glmexport.foundation.errors import MachineError
from glmexport.foundation.progress import Silent


def require_browser() -> None:
    """Chromium and onnxruntime-web."""
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium on PATH to run a bundle in (apt-get install chromium)")
    try:
        web_runtime("wasm")
    except MachineError as error:
        if (cache_folder() / ARCHIVE).is_file():
            # It is there and was refused, which is no reason to skip.
            raise
        pytest.skip(f"no onnxruntime-web to run a bundle with: {error.message}")


def emulated_arm64() -> Path:
    """Files of an arm64 machine, fetched once and kept in the user's cache."""
    if not (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")):
        pytest.skip("QEMU's emulation of arm64 is not installed (apt-get install qemu-user-static)")
    place = default_sysroot().with_name(f"qemu-arm64-{onnxruntime.__version__}")
    if not place.exists():
        try:
            prepare(place, Silent())
        except MachineError as error:
            pytest.skip(f"an emulated arm64 machine cannot be made here: {error.message}")
    return place
