"""Whatever is killed, and whenever: ``current`` is a whole and verified release, and the next deployment goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from deployment.conftest import DAMAGED, Place, Places, Releases, free_port, write_site
from sshd import Sshd

from glmexport.deployment.rollout import DeployOptions, deploy
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import Site
from glmexport.foundation.progress import Silent
from glmexport.release.verifier import verify
from glmexport.wire.server.answering import Endpoint
from glmexport.wire.server.ledger import Ledger

pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")

#: Seconds that a deployment here takes at most before it is killed.
LONGEST_S = 4.0


def client(site: Site, release: SignedBundle) -> None:
    with contextlib.suppress(BaseException):
        deploy(site, release, Silent(), DeployOptions(allow_older=True))


def kill(processes: Callable[[psutil.Process], bool]) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if processes(process):
                process.kill()


def whole(place: Place, releases: Releases) -> str | None:
    """The present release, every file of which is what was signed."""
    name = place.current
    if name:
        verify(place.root / "releases" / name, releases.public, None, None)
    for each in (place.root / "releases").glob("[0-9a-f]*"):
        verify(each, releases.public, None, None)
    return name


def kill_at_random(
    runs: int, seed: int, releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> dict[str, int]:
    """How often each kind of thing was killed."""
    chance = random.Random(seed)
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd, reconnects=0, smoke_port=free_port()))
    wanted = [releases.signed(counter) for counter in (1, 2, DAMAGED)]
    good = {release.name for release in wanted[:2]}
    deploy(site, wanted[0], Silent())
    root = str(place.root)
    victims = {
        "the client": lambda process: process.pid == child.pid,
        "the network": lambda process: process.name().startswith("sshd") and process.pid in _below(sshd.process.pid),
        "what switches": lambda process: "deploy.pyz" in " ".join(process.cmdline()) and root in process.cmdline(),
        "the server": lambda process: process.pid in _below(place.process.pid),
    }
    killed = dict.fromkeys(victims, 0)
    fork = multiprocessing.get_context("fork")
    for _ in range(runs):
        release = chance.choice(wanted)
        child = fork.Process(target=client, args=(site, release))
        child.start()
        for _ in range(chance.choice((1, 1, 2))):
            time.sleep(chance.uniform(0, LONGEST_S))
            victim = chance.choice(list(victims))
            kill(victims[victim])
            killed[victim] += 1
            assert whole(place, releases)
        child.join(30)
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
    _settled(place)
    # What was killed in the middle is taken back, and then the release is served.
    for release in wanted[:2]:
        (outcome,) = deploy(site, release, Silent(), DeployOptions(allow_older=True))
        assert outcome.state in ("confirmed", "unchanged"), outcome
        assert whole(place, releases) == release.name
        assert Endpoint("127.0.0.1", place.port, None).ask("/readyz")[1]["directory"] == release.name
    confirmed = Ledger(place.root / "ledger.jsonl").confirmed()
    assert set(confirmed) == good
    return killed


def _below(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {process.pid for process in psutil.Process(pid).children(recursive=True)}
    return set()


def _settled(place: Place) -> None:
    """Nothing is at work on the server any more."""
    root = str(place.root)
    for _ in range(600):
        at_work = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                at_work |= "deploy.pyz" in " ".join(process.cmdline()) and root in process.cmdline()
        if not at_work:
            return
        time.sleep(0.1)
    pytest.fail("the server's program does not end")


def test_killed_now_and_then(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    kill_at_random(6, 1, releases, places, sshd, tmp_path)


@pytest.mark.release
def test_killed_a_hundred_times(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    killed = kill_at_random(100, 2, releases, places, sshd, tmp_path)
    assert min(killed.values()) > 10, killed
