"""Facts about a server, gathered before anything is sent to it."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
from typing import Any

from glmexport.foundation.untrusted import SMALL, parse

_TIMEOUT_S = 60


def server_facts(command: list[str], ports: list[int]) -> dict[str, Any]:
    """Return Python, C library, openssl, the glmexport of ``command``, its view of the host, and who has the ports."""
    probed, why = _probe([command[0], "targets", "probe", "--json"])
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "openssl": shutil.which("openssl"),
        "version": _output([command[0], "--version"])[0],
        "host": probed,
        "host_unknown_because": why,
        "ports": {str(port): _taken(port) for port in ports},
    }


def _probe(command: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    said, why = _output(command)
    try:
        return (parse(said.encode(), SMALL), None) if said else (None, why)
    except ValueError as error:
        return None, f"{' '.join(command)} prints no JSON: {error}"


def _output(command: list[str]) -> tuple[str | None, str | None]:
    """Return what a command prints, or why it does not."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return None, f"{' '.join(command)} ended with {done.returncode}: {''.join(said)}"
    return done.stdout.decode("utf-8", "replace").strip(), None


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
