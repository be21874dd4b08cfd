"""A disk that fails while a bundle is built: a message, nothing half written, and the same command goes on later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builds import TARGET, Sample

from glmexport.bundle.manifest import read_manifest, verify_files
from glmexport.foundation.errors import EXIT_INCONCLUSIVE, EXIT_MACHINE

pytestmark = pytest.mark.slow

#: Calls below FAULT_UNDER end with EIO, from the FAULT_AFTER-th on.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/types.h>

static int calls;

static int fails(int fd, const char *kind) {
    const char *under = getenv("FAULT_UNDER"), *after = getenv("FAULT_AFTER"), *what = getenv("FAULT_KIND");
    char link[64], path[4096];
    if (!under || !after || !what || strcmp(what, kind)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    if (strncmp(path, under, strlen(under))) return 0;
    return __sync_add_and_fetch(&calls, 1) > atoi(after);
}

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (fails(fd, "write")) { errno = EIO; return -1; }
    return real(fd, data, size);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (fails(fd, "fsync")) { errno = EIO; return -1; }
    return real(fd);
}

ssize_t read(int fd, void *data, size_t size) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    if (fails(fd, "read")) { errno = EIO; return -1; }
    return real(fd, data, size);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to make a disk fail with (apt-get install gcc)")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


def build(sample: Sample, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "glmexport", "build", sample.checkpoint, "--target", TARGET, "--recipe", sample.recipe,
        "--threads", "1", "-o", output, "--positions", "24",
    ]  # fmt: skip
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("kind", "after"), [("write", "3"), ("fsync", "4"), ("write", "60")])
def test_a_disk_that_fails(sample: Sample, shim: Path, tmp_path: Path, kind: str, after: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    fault = {"LD_PRELOAD": str(shim), "FAULT_UNDER": str(place), "FAULT_AFTER": after, "FAULT_KIND": kind}
    done = build(sample, place / "bundle", **fault)
    assert done.returncode == EXIT_MACHINE, done.stderr
    assert "Traceback" not in done.stderr and "Input/output error" in done.stderr
    assert not (place / "bundle").exists()


@pytest.mark.release
def test_it_goes_on_when_the_disk_is_well_again(sample: Sample, shim: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    fault = {"LD_PRELOAD": str(shim), "FAULT_UNDER": str(place), "FAULT_AFTER": "40", "FAULT_KIND": "write"}
    assert build(sample, place / "bundle", **fault).returncode == EXIT_MACHINE
    done = build(sample, place / "bundle")
    assert done.returncode == EXIT_INCONCLUSIVE, done.stderr
    manifest = read_manifest(place / "bundle")
    verify_files(place / "bundle", manifest)
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in sample.built.manifest.files]
    assert [path.name for path in place.iterdir()] == ["bundle"]


def test_a_checkpoint_that_cannot_be_read(sample: Sample, shim: Path, tmp_path: Path) -> None:
    fault = {"LD_PRELOAD": str(shim), "FAULT_UNDER": str(sample.checkpoint), "FAULT_AFTER": "2", "FAULT_KIND": "read"}
    done = build(sample, tmp_path / "bundle", **fault)
    assert done.returncode == EXIT_MACHINE and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "bundle").exists()
