"""Who deploys to one server at once comes through in turn, and who is killed holds nobody up."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from deployment.conftest import Place, Places, Releases, write_site
from sshd import Sshd

from glmexport.deployment.rollout import DeployOptions, Outcome, deploy, prune
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import Site
from glmexport.foundation.progress import Silent
from glmexport.release.verifier import verify
from glmexport.wire.server.__main__ import main
from glmexport.wire.server.layout import Root
from glmexport.wire.standalone import Failure

pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")


def deployed(site: Site, release: SignedBundle, outcomes: list[Outcome]) -> None:
    outcomes += deploy(site, release, Silent(), DeployOptions(allow_older=True))


def test_two_deployments_at_once_come_through(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    wanted = [releases.signed(1), releases.signed(2), releases.signed(3)]
    outcomes: list[Outcome] = []
    together = [threading.Thread(target=deployed, args=(site, release, outcomes)) for release in wanted]
    for each in together:
        each.start()
    for each in together:
        each.join(240)
    assert [(outcome.state, outcome.why) for outcome in outcomes] == [("confirmed", None)] * 3
    assert place.current in {release.name for release in wanted}
    for release in wanted:
        verify(place.root / "releases" / release.name, releases.public, None, None)
    assert not list((place.root / "incoming").iterdir())
    assert not list(place.root.glob("*.partial")) and not list((place.root / "orders").glob("*.partial"))


def sending(site: Site, release: SignedBundle) -> None:
    with contextlib.suppress(BaseException):
        deploy(site, release, Silent())


def test_who_is_killed_while_sending_holds_nobody_up(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    child = multiprocessing.get_context("fork").Process(target=sending, args=(site, releases.signed(1)))
    child.start()
    until = time.monotonic() + 60
    while not held(place) and time.monotonic() < until:
        time.sleep(0.01)
    child.kill()
    child.join()
    began = time.monotonic()
    (outcome,) = deploy(site, releases.signed(2), Silent())
    assert (outcome.state, place.current) == ("confirmed", releases.signed(2).name)
    assert time.monotonic() - began < 60


def held(place: Place) -> bool:
    """Whether somebody sends."""
    import fcntl

    path = place.root / "sending"
    if not path.exists():
        return False
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


HOLDING = """
import sys
from glmexport.wire.server import __main__ as program
program._SILENCE_S = float(sys.argv[1])
sys.exit(program.main(["hold", sys.argv[2]]))
"""


def holder(root: Path, silence_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLDING, str(silence_s), str(root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and json.loads(process.stdout.readline()) == {"event": "held"}
    return process


def test_a_turn_ends_with_who_has_it(tmp_path: Path) -> None:
    """Whether their line is closed, or only silent."""
    (tmp_path / "root").mkdir()
    root = Root(tmp_path / "root")
    with holder(root.path, 60) as first:
        with pytest.raises(Failure, match="Another deployment"), root.alone(lock="sending"):
            pass
        assert first.stdin
        first.stdin.close()
        with holder(root.path, 0.5) as second, root.alone(30, "sending"):
            assert first.wait(30) == 0 and second.wait(30) == 0


def test_what_a_killed_deployment_left_goes_with_the_next_pruning(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    deploy(site, releases.signed(1), Silent())
    for left in (".partial-" + "0" * 32, ".gone-" + "1" * 32):
        (place.root / "releases" / left).mkdir()
        (place.root / "releases" / left / "model.onnx").write_bytes(b"x")
    old, new = place.root / "orders" / ("0" * 32 + ".json"), place.root / "orders" / ("1" * 32 + ".json")
    for path in (old, new, place.root / "deploy.pyz.0123.partial"):
        path.write_text("{}")
    for path in (old, place.root / "deploy.pyz.0123.partial"):
        os.utime(path, (0, 0))
    (outcome,) = prune(site, 1, Silent())
    assert outcome.state == "done"
    assert [path.name for path in (place.root / "releases").iterdir()] == [releases.signed(1).name]
    assert new.exists() and not old.exists() and not list(place.root.glob("*.partial"))


def test_a_folder_of_another_deployment_is_not_pruned_while_it_works(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.make()
    (root.releases / (".partial-" + "0" * 32)).mkdir()
    with root.alone():
        assert main(["prune", str(tmp_path), "1"]) == 1
    assert list(root.releases.iterdir())
