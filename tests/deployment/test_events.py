"""What a server tells may be anything; whoever deploys is told so in a sentence."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from deployment.conftest import Places, Releases, write_site
from sshd import Sshd

from glmexport.deployment.rollout import deploy, prune, roll_back, status
from glmexport.foundation.progress import Silent

pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")

DONE = '{"event": "done"}'
PROGRAMS = {
    "nothing": "true",
    "done": f"echo '{DONE}'",
    "facts of nothing": f"""echo '{{"event": "facts"}}'; echo '{{"event": "status"}}'; echo '{DONE}'""",
    "facts of another kind": f"""echo '{{"event": "facts", "free_bytes": "x", "host": []}}'; echo '{DONE}'""",
    "a status of another kind": f"""echo '{{"event": "status", "current": 7, "ledger": [7]}}'; echo '{DONE}'""",
    "deep lists": "head -c 200000 /dev/zero | tr '\\0' '['; echo",
    "a line without end": "head -c 20000000 /dev/zero | tr '\\0' 'x'",
    "an error without end": "head -c 20000000 /dev/zero >&2",
    "an error of nothing": """echo '{"event": "error"}'""",
    "words": "echo hello; echo '{\"event\": 7}'; echo '[]'; echo 7",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_cannot_be_is_told_so(
    program: str, releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> None:
    place = places()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd, python=str(python), reconnects=0))
    release = releases.signed(1)
    tracemalloc.start()
    try:
        outcomes = [*deploy(site, release, Silent()), *status(site, Silent())]
        later = [*roll_back(site, None, Silent()), *prune(site, 1, Silent())]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert all(outcome.state == "failed" and outcome.why and outcome.next_step for outcome in outcomes)
    assert not any(outcome.state == "confirmed" for outcome in later)
    assert place.current is None
