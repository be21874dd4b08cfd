"""Verified is what was signed and nothing else, by model-signing and by the shipped script alike."""

from __future__ import annotations

import ast
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signatures import COUNTER, SCRIPT, Authority, Judge, Pair, make_authority, pair, resign, sign_with, tree

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import EVIDENCE, MANIFEST, is_evidence
from glmexport.foundation.errors import EXIT_INPUT, EXIT_UNVERIFIED
from glmexport.foundation.progress import Silent
from glmexport.release import verifier
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.release.release import Release, read_release
from glmexport.workflows.sign import sign_bundle

FILES = [
    "attestations/ml-bom.json",
    "attestations/provenance.json",
    "attestations/test-result.json",
    "bundle.json",
    "chat_template.jinja",
    "genai_config.json",
    "golden.json",
    "model.onnx",
    "release.json",
    "report.html",
    "report.json",
    "report.md",
    "report.xml",
    "scoring.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "verify.py",
]


def test_what_was_signed_is_verified(signed: Path, outcome: Judge) -> None:
    names = set(tree(signed))
    assert set(FILES) <= names and "model.sig" in names
    assert outcome(signed).code == 0
    assert outcome(signed, newer=COUNTER - 1).code == 0
    assert read_release(signed).counter == COUNTER


def test_the_link_to_a_release_is_followed_once(signed: Path, outcome: Judge, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(signed)
    assert outcome(tmp_path / "current").code == 0


def test_a_changed_byte_in_any_file_is_named(release: Path, outcome: Judge) -> None:
    for name in tree(release):
        if name == "model.sig":
            continue
        path = release / name
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        judged = outcome(release)
        assert judged.code == EXIT_UNVERIFIED and f"{name} is not what was signed" in judged
        path.write_bytes(content)
    assert outcome(release).code == 0


@pytest.mark.parametrize(
    "name", ["model.onnx", "release.json", "golden.json", "attestations/provenance.json", MANIFEST]
)
def test_a_removed_file_is_named(name: str, release: Path, outcome: Judge) -> None:
    (release / name).unlink()
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and f"{name} is signed and missing" in judged


@pytest.mark.parametrize(
    "name", ["extra", "weights/extra", "attestations/more.json", ".hidden", ".git/config", "Model.onnx", "report.csv"]
)
def test_an_added_file_is_named(name: str, release: Path, outcome: Judge) -> None:
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_bytes(b"")
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and f"{name} is not signed" in judged


def a_link(path: Path) -> None:
    shutil.copyfile(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def a_second_name(path: Path) -> None:
    os.link(path, path.parent.parent / "elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


@pytest.mark.parametrize("change", [a_link, a_second_name, a_pipe, a_socket])
def test_what_is_no_file_of_its_own_is_named(change: Callable[[Path], None], release: Path, outcome: Judge) -> None:
    change(release / "tokenizer.json")
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "tokenizer.json" in judged


def test_a_linked_folder_is_named(release: Path, outcome: Judge, tmp_path: Path) -> None:
    (release / "weights").rename(tmp_path / "weights")
    (release / "weights").symlink_to(tmp_path / "weights")
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "weights is a link" in judged


@pytest.mark.parametrize("change", [a_link, Path.unlink, Path.mkdir])
def test_the_signature_itself_is_a_file(change: Callable[[Path], None], release: Path, outcome: Judge) -> None:
    if change is Path.mkdir:
        (release / "model.sig").unlink()
    change(release / "model.sig")
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "model.sig" in judged


def test_another_key_is_refused(signed: Path, outcome: Judge, tmp_path: Path) -> None:
    for curve in ("prime256v1", "secp384r1", "secp521r1", "secp256k1"):
        judged = outcome(signed, key=pair(tmp_path, curve, curve).public)
        assert judged.code == EXIT_UNVERIFIED and "model.sig" in judged


def test_an_unusable_key_is_the_user_s(signed: Path, outcome: Judge, keys: Pair, tmp_path: Path) -> None:
    (tmp_path / "garbage.pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    (tmp_path / "empty.pem").write_text("")
    wrong = [tmp_path / "absent.pem", tmp_path / "garbage.pem", tmp_path / "empty.pem", keys.private, tmp_path]
    for path in wrong:
        assert outcome(signed, key=path).code == EXIT_INPUT
    (tmp_path / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert outcome(signed, root=tmp_path / "absent.pem").code == EXIT_INPUT
    assert outcome(tmp_path / "nowhere").code == EXIT_INPUT


@pytest.mark.parametrize("newer", [COUNTER, COUNTER + 1, 1 << 62])
def test_an_older_release_is_refused(newer: int, signed: Path, outcome: Judge) -> None:
    judged = outcome(signed, newer=newer)
    assert judged.code == EXIT_UNVERIFIED and f"counter {COUNTER}" in judged


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A signature with something changed in its JSON."""

    def edit(content: bytes) -> bytes:
        table = json.loads(content)
        change(table)
        return json.dumps(table).encode()

    return edit


def in_payload(before: bytes, after: bytes) -> Callable[[bytes], bytes]:
    def change(table: dict[str, Any]) -> None:
        payload = base64.b64decode(table["dsseEnvelope"]["payload"])
        assert before in payload
        table["dsseEnvelope"]["payload"] = base64.b64encode(payload.replace(before, after)).decode()

    return edited(change)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "noise": lambda content: bytes(range(256)),
    "half": lambda content: content[: len(content) // 2],
    "all but the last": lambda content: content[:-1],
    "more behind it": lambda content: content + b"{}",
    "a list": lambda content: b"[]",
    "a number": lambda content: b"1",
    "null": lambda content: b"null",
    "deep lists": lambda content: b"[" * 200_000 + b"]" * 200_000,
    "deep tables": lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": lambda content: content.replace(b"[]", b"1" * 10_000),
    "a key twice": lambda content: content.replace(b'"mediaType"', b'"mediaType":"x","mediaType"', 1),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "another kind": edited(lambda table: table.update(mediaType="application/json")),
    "another spelling": edited(lambda table: table.update(dsse_envelope=table["dsseEnvelope"])),
    "no envelope": edited(lambda table: table.pop("dsseEnvelope")),
    "no material": edited(lambda table: table.update(verificationMaterial={})),
    "a log entry": edited(lambda table: table["verificationMaterial"].update(tlogEntries=[{}])),
    "another hint": edited(lambda table: table["verificationMaterial"].update(publicKey={"hint": "0" * 64})),
    "an empty chain": edited(
        lambda table: table.update(verificationMaterial={"x509CertificateChain": {"certificates": []}})
    ),
    "a key beside an empty chain": edited(
        lambda table: table["verificationMaterial"].update(x509CertificateChain={"certificates": []})
    ),
    "a key that is named by a number": edited(lambda table: table["dsseEnvelope"]["signatures"][0].update(keyid=7)),
    "a key that is named by nothing": edited(lambda table: table["dsseEnvelope"]["signatures"][0].update(keyid=None)),
    "a key that is named by half a character": edited(
        lambda table: table["dsseEnvelope"]["signatures"][0].update(keyid="\ud800")
    ),
    "base64 with bits that nobody reads": edited(
        lambda table: table["dsseEnvelope"].update(payload=table["dsseEnvelope"]["payload"] + "QQ==")
    ),
    "many values": lambda content: b"[" + b"0," * (3 << 20) + b"0]",
    "many bytes": lambda content: content + b" " * (1 << 24),
    "no signature": edited(lambda table: table["dsseEnvelope"].update(signatures=[])),
    "two signatures": edited(lambda table: table["dsseEnvelope"]["signatures"].append({"sig": "AAAA", "keyid": ""})),
    "an empty signature": edited(lambda table: table["dsseEnvelope"]["signatures"][0].update(sig="")),
    "no base64": edited(lambda table: table["dsseEnvelope"]["signatures"][0].update(sig="=*=")),
    "a text as list": edited(lambda table: table["dsseEnvelope"].update(signatures="sig")),
    "another type of payload": edited(lambda table: table["dsseEnvelope"].update(payloadType="text/plain")),
    "a payload of nothing": edited(lambda table: table["dsseEnvelope"].update(payload="")),
    "another digest": in_payload(b'"digest": "', b'"digest": "0'),
    "another name": in_payload(b"model.onnx", b"Model.onnx"),
}


@pytest.mark.parametrize("change", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_signature_is_refused(change: Callable[[bytes], bytes], release: Path, outcome: Judge) -> None:
    path = release / "model.sig"
    path.write_bytes(change(path.read_bytes()))
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "model.sig" in judged


HOSTILE = [
    "../outside",
    "/etc/passwd",
    "weights/../../x",
    "a//b",
    "./a",
    "a\x00b",
    "a\nb",
    "C:x",
    "a\\b",
    "x" * 2000,
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leaves_the_bundle_is_refused(name: str, release: Path, outcome: Judge, keys: Pair) -> None:
    """Even with a signature that holds."""
    digests = tree(release)
    del digests["model.sig"]
    resign(release, keys.private, {**digests, name: "0" * 64})
    assert outcome(release).code == EXIT_UNVERIFIED


@pytest.mark.parametrize("twin", ["MODEL.ONNX", "Bundle.json", "model.onnx/x", "weights/BLOCK"])
def test_names_that_some_file_systems_take_for_one_are_refused(
    twin: str, release: Path, outcome: Judge, keys: Pair
) -> None:
    digests = tree(release)
    del digests["model.sig"]
    digests |= {"weights/block": "0" * 64} if twin.startswith("weights") else {}
    resign(release, keys.private, {**digests, twin: "0" * 64})
    assert outcome(release).code == EXIT_UNVERIFIED


def test_what_is_signed_and_not_of_the_bundle_is_refused(release: Path, outcome: Judge, keys: Pair) -> None:
    (release / "evil.onnx").write_bytes(b"x")
    resign(release, keys.private)
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "evil.onnx" in judged
    (release / "evil.onnx").rename(release / "attestations" / "evil.onnx")
    resign(release, keys.private)
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "attestations/evil.onnx" in judged


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"files": 1}', b'{"files": [1]}', b'{"files": [{"path": 1}]}',
        b'{"files": [{"path": "model.onnx"}]}', b'{"files": [{"path": ["x"]}]}', b'{"files": [{"path": "../x"}]}',
    ],
)  # fmt: skip
def test_a_manifest_that_lists_something_else_is_refused(
    content: bytes, release: Path, outcome: Judge, keys: Pair
) -> None:
    (release / MANIFEST).write_bytes(content)
    resign(release, keys.private)
    assert outcome(release).code == EXIT_UNVERIFIED


@pytest.mark.parametrize(
    "changes",
    [
        {"counter": -1}, {"counter": True}, {"counter": "7"}, {"counter": 7.5}, {"counter": 1 << 63}, {"counter": None},
        {"bundle": "sha256:0"}, {"bundle": 1}, {"bundle": "sha256:" + "0" * 64 + "\n"}, {"target": None},
        {"version": 2}, {"format": "another"}, {"format": ["x"]}, {"bundle": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_release_that_says_nothing_is_refused(
    changes: dict[str, Any], release: Path, outcome: Judge, keys: Pair
) -> None:
    path = release / "release.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    resign(release, keys.private)
    judged = outcome(release)
    assert judged.code == EXIT_UNVERIFIED and "release.json" in judged


def by_certificate(bundle: Path, authority: Authority, chain: tuple[Path, ...]) -> None:
    files = KeyFiles(authority.key, authority.certificate, chain)
    sign_bundle(Bundle.open(bundle), open_signatory(files), counter=8, golden=False, progress=Silent())


def test_a_certificate_is_verified_by_its_root(
    release: Path, outcome: Judge, authority: Authority, keys: Pair, tmp_path: Path
) -> None:
    by_certificate(release, authority, (authority.intermediate, authority.root))
    assert outcome(release, root=authority.root, newer=7).code == 0
    judged = outcome(release, root=authority.root, newer=8)
    assert judged.code == EXIT_UNVERIFIED
    judged = outcome(release, key=keys.public)
    assert judged.code == EXIT_UNVERIFIED and "--root" in judged
    # What stands between is no root, and a root of the same name is another.
    assert outcome(release, root=authority.certificate).code == EXIT_UNVERIFIED
    (tmp_path / "other").mkdir()
    assert outcome(release, root=make_authority(tmp_path / "other").root).code == EXIT_UNVERIFIED
    (release / "model.onnx").write_bytes(b"x")
    judged = outcome(release, root=authority.root)
    assert judged.code == EXIT_UNVERIFIED and "model.onnx is not what was signed" in judged


def test_a_key_s_signature_has_no_root(signed: Path, outcome: Judge, authority: Authority) -> None:
    judged = outcome(signed, root=authority.root)
    assert judged.code == EXIT_UNVERIFIED and "--key" in judged


def test_a_root_of_the_system_s_is_not_asked(
    release: Path, outcome: Judge, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_certificate(release, authority, (authority.intermediate, authority.root))
    system = tmp_path / "system"
    system.mkdir()
    shutil.copyfile(authority.root, system / "root.pem")
    subprocess.run(["openssl", "rehash", str(system)], check=True)
    monkeypatch.setenv("SSL_CERT_DIR", str(system))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.root))
    (tmp_path / "other").mkdir()
    assert outcome(release, root=make_authority(tmp_path / "other").root).code == EXIT_UNVERIFIED


@pytest.mark.parametrize("curve", ["secp384r1", "secp521r1"])
def test_other_curves(curve: str, release: Path, outcome: Judge, tmp_path: Path) -> None:
    made = pair(tmp_path, curve, curve)
    sign_with(release, made.private, counter=8)
    assert outcome(release, key=made.public).code == 0


def upstream(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_model_signing_s_own_program_comes_to_the_same(
    release: Path, outcome: Judge, keys: Pair, authority: Authority, tmp_path: Path
) -> None:
    signature = release / "model.sig"
    ours = upstream("verify", "key", "--public_key", keys.public, "--signature", signature, release)
    assert ours.returncode == 0, ours.stderr
    signature.unlink()
    theirs = upstream("sign", "key", "--private_key", keys.private, "--signature", signature, release)
    assert theirs.returncode == 0, theirs.stderr
    assert outcome(release).code == 0
    # It leaves what belongs to git aside; we do not.
    (release / ".gitattributes").write_bytes(b"")
    assert outcome(release).code == EXIT_UNVERIFIED
    (release / ".gitattributes").unlink()
    by_certificate(release, authority, (authority.intermediate, authority.root))
    chain = ["--certificate_chain", authority.root]
    ours = upstream("verify", "certificate", *chain, "--signature", signature, release)
    assert ours.returncode == 0, ours.stderr
    (release / "model.onnx").write_bytes(b"x")
    assert upstream("verify", "certificate", *chain, "--signature", signature, release).returncode != 0


def test_the_script_needs_python_alone() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names
    # Its parts have become one module, in which a name is one thing.
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    defined += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert len(set(defined)) == len(defined)
    assert EVIDENCE | {MANIFEST} == verifier.BESIDE
    for name in ("attestations/x.json", "attestations/x.onnx", "attestations/a/x.json", "x.json", "a/report.json"):
        assert verifier.is_legal_beside(name) == is_evidence(name)


@pytest.mark.parametrize(
    "arguments", [[], ["x"], ["x", "--key", "a", "--root", "b"], ["x", "--key", "a", "--newer-than", "soon"]]
)
def test_the_script_s_usage(arguments: list[str]) -> None:
    asked = subprocess.run([sys.executable, str(SCRIPT), *arguments], check=False, capture_output=True, text=True)
    assert asked.returncode == EXIT_INPUT and "usage" in asked.stderr and not asked.stdout


def test_the_script_without_openssl(signed: Path, keys: Pair, tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(SCRIPT), str(signed), "--key", str(keys.public)]
    asked = subprocess.run(command, check=False, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert asked.returncode == 69 and "openssl is not on this machine" in asked.stderr


@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "b", "\0", "C:", "\\"])).map("/".join))
def test_a_legal_name_stays_inside(name: str) -> None:
    inside = Path("/bundle")
    if verifier.is_legal_name(name):
        path = Path(os.path.normpath(inside / name))
        assert path != inside and path.is_relative_to(inside)
        assert path.relative_to(inside).as_posix() == name
    else:
        with pytest.raises(verifier.VerificationError):
            verifier.check_names([name], "x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
FIELDS = st.sampled_from(["format", "version", "bundle", "target", "counter"])


@given(st.dictionaries(FIELDS, VALUES), st.booleans())
def test_a_release_that_the_script_takes_is_one(changes: dict[str, Any], bare: bool) -> None:
    """What it takes, the package takes; what the package writes, it takes."""
    import hashlib
    import tempfile

    written = Release(bundle="sha256:" + "0" * 64, target="x", counter=3, glmexport="1")
    content = json.dumps({**({} if bare else written.model_dump()), **changes}).encode()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "release.json").write_bytes(content)
        signed = {"release.json": hashlib.sha256(content).hexdigest()}
        try:
            found = verifier.check_release(Path(directory), signed, None)
        except verifier.VerificationError:
            assert changes or bare
        else:
            assert read_release(Path(directory)).counter == found.counter
