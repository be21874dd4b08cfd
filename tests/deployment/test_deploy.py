"""A release on servers behind a real sshd: served, refused or taken back, and what served before still does."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from builds import Run
from deployment.conftest import DAMAGED, Places, Releases, free_port, key_pair, write_site
from devices.conftest import Hooked
from sshd import Sshd

from glmexport.deployment.rollout import DeployOptions, deploy, prune, roll_back, status
from glmexport.deployment.signed import SignedBundle
from glmexport.foundation.errors import (
    EXIT_BLOCK,
    EXIT_INPUT,
    EXIT_MACHINE,
    EXIT_PASS,
    EXIT_UNVERIFIED,
    DefinitionError,
    UnverifiedError,
)
from glmexport.foundation.progress import Silent
from glmexport.release.verifier import verify
from glmexport.wire import transfer
from glmexport.wire.server.__main__ import main

pytest.importorskip("asyncssh", reason="the extra 'deploy' is not installed")


def events(root: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (root / "ledger.jsonl").read_text().splitlines()]


def test_first_release_then_another(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    first, second = releases.signed(1), releases.signed(2)
    (outcome,) = deploy(site, first, Silent())
    assert (outcome.state, outcome.release, outcome.why) == ("confirmed", first.name, None)
    assert outcome.sent_bytes >= first.bytes - max(entry.size for entry in first.files)
    assert place.current == first.name
    held = place.root / "releases" / first.name
    verify(held, releases.public, None, None)
    for path in held.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o444)
        assert path.is_dir() or path.stat().st_nlink == 1
    assert events(place.root) == ["trust", "switching", "confirmed"]
    assert not list((place.root / "incoming").iterdir())
    # Of the next one, only what differs is sent.
    (outcome,) = deploy(site, second, Silent())
    assert (outcome.state, place.current) == ("confirmed", second.name)
    there = {entry.sha256 for entry in first.files}
    assert outcome.sent_bytes == sum(entry.size for entry in second.files if entry.sha256 not in there)
    assert outcome.sent_bytes < second.bytes / 2
    # Once more: nothing to do.
    (outcome,) = deploy(site, second, Silent())
    assert (outcome.state, outcome.sent_bytes) == ("unchanged", 0)
    (told,) = status(site, Silent())
    assert told.facts["confirmed"] == [first.name, second.name] and told.facts["current"] == second.name
    assert told.head == outcome.head or told.head


def test_wrong_answers_are_taken_back(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    good, bad = releases.signed(1), releases.signed(DAMAGED)
    deploy(site, good, Silent())
    (outcome,) = deploy(site, bad, Silent())
    assert outcome.state == "rolled back" and outcome.judged
    assert outcome.why and "Golden prompt 1" in outcome.why and f"{good.name} serves again" in outcome.why
    assert place.current == good.name
    assert events(place.root)[-2:] == ["switching", "rolled back"]
    # Where nothing served before, nothing does afterwards.
    empty = places()
    site = write_site(tmp_path / "other.toml", releases, empty.toml("b", sshd))
    (outcome,) = deploy(site, bad, Silent())
    assert outcome.state == "rolled back" and empty.current is None
    assert outcome.why and "nothing is now" in outcome.why


def test_smoke_test_refuses_without_switching(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd, smoke_port=free_port()))
    good, bad = releases.signed(1), releases.signed(DAMAGED)
    deploy(site, good, Silent())
    (outcome,) = deploy(site, bad, Silent())
    assert outcome.state == "refused" and outcome.why and "On port" in outcome.why
    assert place.current == good.name
    assert events(place.root) == ["trust", "switching", "confirmed", "refused"]


def test_older_release_is_refused(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    older, newer = releases.signed(1), releases.signed(2)
    deploy(site, newer, Silent())
    (outcome,) = deploy(site, older, Silent())
    assert outcome.state == "refused" and outcome.why and "counter 1, and 2 has been served" in outcome.why
    assert place.current == newer.name
    (outcome,) = deploy(site, older, Silent(), DeployOptions(allow_older=True))
    assert outcome.state == "confirmed" and place.current == older.name
    # What was served once is remembered.
    (outcome,) = deploy(site, releases.signed(1), Silent())
    assert outcome.state == "refused" or outcome.state == "unchanged"


def test_rollback_and_prune(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    (outcome,) = roll_back(site, None, Silent())
    assert outcome.state == "failed" and outcome.why and "no former release" in outcome.why
    names = []
    for counter in (1, 2, 3, 4):
        names.append(releases.signed(counter).name)
        deploy(site, releases.signed(counter), Silent())
    (outcome,) = roll_back(site, None, Silent())
    assert (outcome.state, place.current) == ("confirmed", names[2])
    (outcome,) = roll_back(site, names[0], Silent())
    assert (outcome.state, place.current) == ("confirmed", names[0])
    (outcome,) = roll_back(site, "0" * 32, Silent())
    assert outcome.state == "failed" and place.current == names[0]
    # The present one, and the one before it, are never removed.
    (outcome,) = prune(site, 1, Silent())
    assert outcome.facts["pruned"] == sorted((names[1], names[3]))
    assert sorted(path.name for path in (place.root / "releases").iterdir()) == sorted((names[0], names[2]))


def test_another_key_is_refused(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    deploy(site, releases.signed(1), Silent())
    folder = tmp_path / "other"
    folder.mkdir()
    private, public = key_pair(folder, "key")
    others = Releases(folder, releases(2), private, public)
    theirs = write_site(tmp_path / "theirs.toml", others, place.toml("a", sshd))
    (outcome,) = deploy(theirs, others.signed(5), Silent())
    assert outcome.state == "trust" and outcome.why and "trusts another key" in outcome.why
    assert place.current == releases.signed(1).name
    # On purpose, and noted.
    (outcome,) = deploy(theirs, others.signed(5), Silent(), DeployOptions(replace_trust=True))
    assert outcome.state == "confirmed" and events(place.root).count("trust") == 2
    # What was signed with the former key is none any more.
    with pytest.raises(UnverifiedError):
        SignedBundle.open(releases(6), public, Silent())


def test_what_is_changed_on_the_way_is_refused(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    deploy(site, releases.signed(1), Silent())
    changed = tmp_path / "changed"
    shutil.copytree(releases(2), changed)
    release = SignedBundle.open(changed, releases.public, Silent())
    # Somebody changes a file, and the list of what is sent to fit.
    (changed / "golden.json").write_text("{}")
    entries = tuple(
        entry if entry.path != "golden.json" else transfer_entry(changed / "golden.json", entry.path)
        for entry in release.files
    )
    forged = SignedBundle(changed, release.name, entries, release.target, release.counter)
    (outcome,) = deploy(site, forged, Silent())
    assert outcome.state == "signature" and outcome.why and "golden.json" in outcome.why
    assert place.current == releases.signed(1).name
    assert [path.name for path in (place.root / "releases").iterdir()] == [releases.signed(1).name]


def transfer_entry(path: Path, name: str):  # type: ignore[no-untyped-def]
    from glmexport.bundle.manifest import FileEntry
    from glmexport.foundation.files import sha256

    return FileEntry(path=name, size=path.stat().st_size, sha256=sha256(path))


def test_a_release_that_is_damaged_on_the_server(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    for counter in (1, 2):
        deploy(site, releases.signed(counter), Silent())
    damaged = place.root / "releases" / releases.signed(1).name / "model.onnx"
    damaged.chmod(0o644)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (outcome,) = roll_back(site, None, Silent())
    assert outcome.state == "signature" and outcome.why and "model.onnx" in outcome.why
    assert place.current == releases.signed(2).name
    # Nor is anything taken of it: the file is in the release that serves, too.
    (outcome,) = deploy(site, releases.signed(3), Silent())
    assert outcome.state == "confirmed"


def test_several_servers_one_after_the_other(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    first, second = places(), places()
    servers = first.toml("a", sshd), second.toml("b", sshd)
    site = write_site(tmp_path / "site.toml", releases, *servers)
    assert [outcome.state for outcome in deploy(site, releases.signed(1), Silent())] == ["confirmed"] * 2
    outcomes = deploy(site, releases.signed(DAMAGED), Silent())
    assert [outcome.state for outcome in outcomes] == ["rolled back", "not begun"]
    good = releases.signed(1).name
    assert (first.current, second.current) == (good, good)
    assert "switching" not in events(second.root)[3:]


def test_a_server_that_is_down_stops_it_before_anything_is_switched(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path
) -> None:
    place = places()
    down = place.toml("b", sshd).replace(str(sshd.port), "1")
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd), down)
    outcomes = deploy(site, releases.signed(1), Silent())
    assert [outcome.state for outcome in outcomes] == ["not begun", "failed"]
    assert place.current is None


@pytest.mark.parametrize(("label", "steps"), [("Sending to a", 9), ("Assembling", 3)])
def test_a_connection_that_is_cut_is_taken_up_again(
    releases: Releases,
    places: Places,
    sshd: Sshd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: str,
    steps: int,
) -> None:
    """While files are sent, and while they are put together; of the switch, see test_killed."""
    monkeypatch.setattr(transfer, "CHUNK", 1 << 14)
    monkeypatch.setattr("glmexport.wire.ssh._WAIT_S", 0.05)
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    release = releases.signed(1)
    progress = Hooked(label, steps, sshd.cut)
    (outcome,) = deploy(site, release, progress)
    assert progress.happened == 1 and any("connection lost" in remark for remark in progress.remarks)
    assert (outcome.state, place.current) == ("confirmed", release.name)
    assert events(place.root).count("switching") == 1
    verify(place.root / "releases" / release.name, releases.public, None, None)


@pytest.mark.parametrize("command", [["false"], ["/no/such/program"]])
def test_a_service_that_does_not_restart(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path, command: list[str]
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    deploy(site, releases.signed(1), Silent())
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd, restart=command))
    (outcome,) = deploy(site, releases.signed(2), Silent())
    assert outcome.state == "rolled back" and outcome.why and "not restarted" in outcome.why
    assert place.current == releases.signed(1).name


def test_the_wrong_kind_of_machine(releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    release = releases.signed(1)
    elsewhere = SignedBundle(release.directory, release.name, release.files, "cuda", release.counter)
    (outcome,) = deploy(site, elsewhere, Silent())
    assert outcome.state == "failed" and outcome.why and "no machine of the target cuda" in outcome.why
    assert outcome.sent_bytes == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(
    releases: Releases, places: Places, sshd: Sshd, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places()
    site = write_site(tmp_path / "site.toml", releases, place.toml("a", sshd, root=str(small_disk)))
    (outcome,) = deploy(site, releases.signed(1), Silent())
    assert outcome.state == "failed" and outcome.why and "MiB are free" in outcome.why
    # It fills up while files are sent, or while they are put together.
    monkeypatch.setattr("glmexport.deployment.rollout.require_fit", lambda *_: None)
    (small_disk / "filler").write_bytes(bytes((1 << 21) - (500 << 10)))
    (outcome,) = deploy(site, releases.signed(1), Silent())
    assert outcome.state == "failed" and outcome.next_step and "pace" in outcome.next_step
    assert not os.path.lexists(small_disk / "current")
    assert not [path for path in (small_disk / "releases").iterdir() if not path.name.startswith(".")]


def test_the_command_line(run: Run, releases: Releases, places: Places, sshd: Sshd, tmp_path: Path) -> None:
    place = places()
    write_site(tmp_path / "site.toml", releases, place.toml("a", sshd))
    site = str(tmp_path / "site.toml")
    done = run("deploy", "--unproven", releases(1), site, "--json")
    assert done.code == EXIT_PASS, done.stderr
    (told,) = json.loads(done.stdout)
    assert told["state"] == "confirmed" and len(told["head"]) == 64
    # Too little text was validated for a verdict.
    done = run("deploy", releases(2), site)
    assert done.code == EXIT_INPUT and "verdict is INCONCLUSIVE" in done.stderr
    done = run("deploy", "--unproven", releases(DAMAGED), site)
    assert done.code == EXIT_BLOCK and "Golden prompt" in done.stderr and "rolled back" in done.stderr
    done = run("status", site)
    assert done.code == EXIT_PASS and "confirmed" in done.stderr and "rolled back" in done.stderr
    done = run("rollback", site)
    assert done.code == EXIT_MACHINE and "no former release" in done.stderr
    done = run("prune", site)
    assert done.code == EXIT_PASS
    done = run("units", site)
    assert done.code == EXIT_PASS and "[Socket]" in done.stdout and "ProtectSystem=strict" in done.stdout
    # Not signed, or changed since.
    plain = tmp_path / "plain"
    shutil.copytree(releases.original, plain)
    done = run("deploy", "--unproven", plain, site)
    assert done.code == EXIT_UNVERIFIED and "model.sig" in done.stderr
    changed = tmp_path / "changed"
    shutil.copytree(releases(2), changed)
    (changed / "tokenizer.json").write_text("{}")
    done = run("deploy", "--unproven", changed, site)
    assert done.code == EXIT_UNVERIFIED and "tokenizer.json" in done.stderr
    assert place.current == releases.signed(1).name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "servers|trust"),
        ("trust = 'k'\n[servers.a]\nat = 'ssh://x'\nlisten = '0.0.0.0'", "api_key_file is needed"),
        ("trust = 'k'\n[servers.a]\nat = 'ssh://x'\nport = 1\nsmoke_port = 1", "smoke_port is the port"),
        ("trust = 'k'\n[servers.a]\nat = 'ssh://x'\nrestart = []", "has to be a command"),
        ("trust = 'k'\n[servers.a]\nat = 'ssh://x'\nprot = 1", "servers.a.prot"),
        ("trust = 'k'\nmax_unavailable = 0\n[servers.a]\nat = 'ssh://x'", "max_unavailable"),
    ],
)
def test_sites_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    from glmexport.deployment.site import open_site

    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(DefinitionError, match=message):
        open_site(path)
    with pytest.raises(DefinitionError, match="no site file"):
        open_site(tmp_path / "none.toml")


def test_units_are_what_systemd_reads(releases: Releases, sshd: Sshd, tmp_path: Path) -> None:
    from glmexport.deployment.site import Server
    from glmexport.deployment.unit import service_unit, socket_unit

    server = Server(at="ssh://x", glmexport="/bin/true", api_key_file="/etc/key", listen="::", allow=("10.0.0.0/8",))
    for name, text in (("glmexport.socket", socket_unit(server)), ("glmexport.service", service_unit(server))):
        (tmp_path / name).write_text(text)
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (apt-get install systemd)")
    units = [str(tmp_path / name) for name in ("glmexport.socket", "glmexport.service")]
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    assert "glmexport" not in done.stderr, done.stderr


def test_units_have_words_as_they_are(tmp_path: Path) -> None:
    """Nothing of a path is replaced by systemd, or taken for another word or line."""
    from glmexport.deployment.site import Server
    from glmexport.deployment.unit import service_unit

    strange = tmp_path / "a b%h'c\"d;e$HOME"
    # systemd has no quotes in the path of a program.
    program = tmp_path / "a b%h;c$HOME" / "glmexport"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    options = ("--name", "50% $HOME ${x} \\n 'x' \"y\"", "", "%i")
    root, key = str(strange / "root%n"), str(strange / "key%n")
    server = Server(at="ssh://x", glmexport=str(program), root=root, api_key_file=key, serve_options=options)
    text = service_unit(server)
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    words = shlex.split(lines["ExecStart"].replace("$$", "$").replace("%%", "\0").replace("%d", "CREDENTIALS"))
    given = [str(program), "serve", *options, f"{root}/current", "--api-key-file", "CREDENTIALS/api-key"]
    assert [word.replace("\0", "%") for word in words] == given
    assert lines["LoadCredential"].replace("%%", "%") == f"api-key:{key}"
    for name in ("Description", "ExecStart", "LoadCredential"):
        assert not re.search(r"(?<!%)%(%%)*(?![%d])", lines[name])
    analyze = shutil.which("systemd-analyze")
    if analyze:
        (tmp_path / "glmexport.service").write_text(text.replace("Requires=glmexport.socket\n", ""))
        asked = [analyze, "verify", str(tmp_path / "glmexport.service")]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert "glmexport.service" not in done.stderr, done.stderr


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize("key", ["root", "python", "glmexport", "api_key_file", "serve_options", "restart"])
def test_a_site_has_no_characters_that_nobody_sees(key: str, character: str, tmp_path: Path) -> None:
    from glmexport.deployment.site import open_site

    value = f"/a{character}ExecStartPre=/bin/b"
    wrong = [value] if key in ("serve_options", "restart") else value
    path = tmp_path / "site.toml"
    path.write_text(f'trust = "x"\n[servers.a]\nat = "ssh://x"\n{key} = {json.dumps(wrong)}\n')
    with pytest.raises(DefinitionError, match="nobody sees"):
        open_site(path)


@pytest.mark.parametrize("key", ["root", "python", "glmexport", "api_key_file"])
@pytest.mark.parametrize("value", ["-x", "--help", "@/bin/x", "!/bin/x", "+/bin/x", ":/x", "|x", "", "/x\\", "$HOME/x"])
def test_a_site_has_paths_that_are_paths(key: str, value: str, tmp_path: Path) -> None:
    from glmexport.deployment.site import open_site

    path = tmp_path / "site.toml"
    path.write_text(f'trust = "x"\n[servers.a]\nat = "ssh://x"\n{key} = {json.dumps(value)}\n')
    with pytest.raises(DefinitionError, match="has to begin"):
        open_site(path)


@pytest.mark.parametrize("name", ["--detached", "-x", "../x", "", "X" * 32, "0" * 31, "0" * 32 + "\n"])
def test_a_release_to_go_back_to_has_a_name(name: str, run: Run, releases: Releases, tmp_path: Path) -> None:
    """Before anybody is asked."""
    write_site(tmp_path / "site.toml", releases, '[servers.a]\nat = "ssh://192.0.2.1"\n')
    done = run("rollback", tmp_path / "site.toml", f"--to={name}")
    assert done.code == EXIT_INPUT and "no name of a release" in done.stderr


def test_what_follows_a_command_is_no_option(tmp_path: Path) -> None:
    """Of the program on a server."""
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / f"{'0' * 32}.json").write_text('{"format": "glmexport-order", "version": 1, "trust": "x"}')
    for words in (["status", str(tmp_path), "--detached"], ["prune", str(tmp_path), "--detached"]):
        assert main(words) == (0 if words[0] == "status" else 1)
