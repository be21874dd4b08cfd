"""Signing writes everything or nothing; what it attests is true, and read by other tools."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builds import Run, Sample
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from filelock import FileLock
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey
from signatures import COUNTER, Authority, Judge, Pair, openssl, pair, sha256, sign_with, tree

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import AdapterSource, read_manifest, verify_files
from glmexport.foundation.errors import EXIT_INPUT, EXIT_UNVERIFIED, BundleError, InputError, MachineError
from glmexport.foundation.progress import Silent
from glmexport.release.bom import bill_of_materials
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.release.release import read_release
from glmexport.report.document import read_report
from glmexport.workflows.sign import sign_bundle

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")


def test_the_digest_does_not_depend_on_signatures(sample: Sample, signed: Path) -> None:
    manifest = read_manifest(signed)
    verify_files(signed, manifest)
    assert manifest.digest() == read_manifest(sample.bundle).digest() == read_release(signed).bundle
    before, after = tree(sample.bundle), tree(signed)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["sub/report.json", "attestations/sub/x.json", "attestations/x.onnx", "sub/model.sig"])
def test_evidence_is_legal_at_its_place_only(name: str, release: Path) -> None:
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_bytes(b"x")
    with pytest.raises(BundleError, match="does not list"):
        verify_files(release, read_manifest(release))


def test_the_counter_only_rises(release: Path, keys: Pair, outcome: Judge) -> None:
    before = tree(release)
    for counter in (COUNTER, COUNTER - 1, 0):
        with pytest.raises(InputError, match=f"counter {COUNTER}"):
            sign_with(release, keys.private, counter=counter)
    assert tree(release) == before
    sign_with(release, keys.private, counter=0, force=True)
    assert read_release(release).counter == 0 and outcome(release).code == 0
    started = int(time.time())
    signed = sign_bundle(Bundle.open(release), open_signatory(KeyFiles(keys.private)), golden=False, progress=Silent())
    assert started <= signed.release.counter <= time.time()


def test_golden_answers_that_are_not_recorded_do_not_stay(release: Path, keys: Pair, outcome: Judge) -> None:
    assert (release / "golden.json").is_file()
    sign_with(release, keys.private, counter=8)
    written = read_release(release)
    assert not (release / "golden.json").exists()
    assert written.golden is None and "--no-golden" in str(written.golden_absent_because)
    assert outcome(release).code == 0


def test_a_report_that_is_gone_is_not_attested(release: Path, keys: Pair, outcome: Judge) -> None:
    (release / "report.json").unlink()
    sign_with(release, keys.private, counter=8)
    assert not (release / "attestations" / "test-result.json").exists()
    assert outcome(release).code == 0


def test_a_report_of_another_bundle_is_refused(release: Path, keys: Pair) -> None:
    path = release / "report.json"
    table = json.loads(path.read_bytes())
    table["subject"]["bundle_digest"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(table))
    before = tree(release.parent)
    with pytest.raises(BundleError, match="another bundle"):
        sign_with(release, keys.private, counter=8)
    assert tree(release.parent) == before


def test_a_bundle_that_is_not_its_manifest_s_is_not_signed(release: Path, keys: Pair) -> None:
    (release / "model.onnx").write_bytes(b"x")
    before = tree(release.parent)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        sign_with(release, keys.private, counter=8)
    assert tree(release.parent) == before


def test_a_link_is_not_signed(release: Path, keys: Pair, tmp_path: Path) -> None:
    (release / "report.html").unlink()
    (release / "report.html").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"report\.html is a link"):
        sign_with(release, keys.private, counter=8)


@pytest.mark.parametrize("last", range(12))
def test_a_signature_that_fails_leaves_everything_as_it_was(
    last: int, release: Path, keys: Pair, outcome: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its renames the disk refuses."""
    before = tree(release.parent)
    rename, count = Path.rename, iter(range(100))

    def failing(path: Path, target: Path) -> Path:
        if next(count) == last:
            raise OSError(28, "No space left on device", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    if last < 9:
        with pytest.raises(OSError, match="No space left"):
            sign_with(release, keys.private, counter=8)
        monkeypatch.undo()
        assert tree(release.parent) == before and outcome(release, newer=COUNTER - 1).code == 0
    else:
        # Five were there, with golden answers; four came.
        sign_with(release, keys.private, counter=8)
    assert sorted(path.name for path in release.parent.iterdir()) == ["release"]


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from signatures import sign_with
rename, left = Path.rename, int(sys.argv[3])
def dying(path, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return rename(path, target)
Path.rename = dying
sign_with(Path(sys.argv[1]), Path(sys.argv[2]), counter=8)
"""


@pytest.mark.parametrize("last", [2, 8])
def test_what_a_killed_signature_leaves_is_refused_and_mended(
    last: int, release: Path, keys: Pair, outcome: Judge
) -> None:
    command = [sys.executable, "-c", KILLED, release, keys.private, last, Path(__file__).parent.parent]
    killed = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=120)
    assert killed.returncode == 9, killed.stderr
    assert outcome(release).code == EXIT_UNVERIFIED
    (left,) = release.parent.glob(".release.signing-*")
    os.utime(left, (0, 0))
    sign_with(release, keys.private, counter=9)
    assert outcome(release, newer=8).code == 0
    assert [path.name for path in release.parent.iterdir()] == ["release"]


def test_a_signature_that_is_being_made_is_not_disturbed(release: Path, keys: Pair) -> None:
    for name in ("held", "new", "left"):
        place = release.parent / f".release.signing-{name}"
        place.mkdir()
        if name != "new":
            os.utime(place, (0, 0))
    with FileLock(release.parent / ".release.signing-held" / "lock"):
        os.utime(release.parent / ".release.signing-held", (0, 0))
        sign_with(release, keys.private, counter=8)
    assert {path.name for path in release.parent.glob(".*")} == {".release.signing-held", ".release.signing-new"}


def test_keys_that_cannot_sign(release: Path, tmp_path: Path, authority: Authority, keys: Pair) -> None:
    before = tree(release)
    (tmp_path / "garbage.pem").write_text("garbage")
    openssl("genrsa", "-out", tmp_path / "rsa.pem", "2048")
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "edwards.pem")
    pair(tmp_path, "koblitz", "secp256k1")
    for name in ("absent.pem", "garbage.pem", "rsa.pem", "edwards.pem", "koblitz.pem"):
        with pytest.raises(InputError, match=name):
            open_signatory(KeyFiles(tmp_path / name))
    with pytest.raises(InputError, match="does not match"):
        open_signatory(KeyFiles(keys.private, authority.certificate, (authority.intermediate, authority.root)))
    with pytest.raises(InputError, match="vouch"):
        open_signatory(KeyFiles(authority.key, authority.certificate, (authority.root,)))
    chainless = open_signatory(KeyFiles(authority.key, authority.certificate, (authority.intermediate,)))
    with pytest.raises(InputError, match="chain"):
        sign_bundle(Bundle.open(release), chainless, counter=8, golden=False, progress=Silent())
    assert tree(release) == before


def test_an_encrypted_key_needs_its_password(release: Path, keys: Pair, tmp_path: Path, outcome: Judge) -> None:
    path = tmp_path / "encrypted.pem"
    openssl("pkcs8", "-topk8", "-in", keys.private, "-passout", "pass:geheim", "-out", path)
    for password in (None, "falsch"):
        with pytest.raises(InputError, match=r"encrypted\.pem"):
            open_signatory(KeyFiles(path, password=password))
    signatory = open_signatory(KeyFiles(path, password="geheim"))
    sign_bundle(Bundle.open(release), signatory, counter=8, golden=False, progress=Silent())
    assert outcome(release, newer=7).code == 0
    assert "geheim" not in repr(KeyFiles(path, password="geheim"))


@pytest.mark.skipif(not SOFTHSM.is_file(), reason="softhsm2 is not installed")
def test_a_key_in_a_token(release: Path, outcome: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PyKCS11")
    tool = shutil.which("pkcs11-tool")
    assert tool, "softhsm2 without opensc"
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm.conf"))
    initialize = ["softhsm2-util", "--init-token", "--free", "--label", "release", "--pin", "1234", "--so-pin", "1234"]
    subprocess.run(initialize, check=True, capture_output=True)
    token = [tool, "--module", str(SOFTHSM), "--token-label", "release", "--login", "--pin", "1234"]
    generate = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "signer", "--id", "01"]
    subprocess.run([*token, *generate], check=True, capture_output=True)
    read = ["--read-object", "--type", "pubkey", "--label", "signer", "-o", str(tmp_path / "public.der")]
    subprocess.run([*token, *read], check=True, capture_output=True)
    public = tmp_path / "public.pem"
    openssl("pkey", "-pubin", "-inform", "DER", "-in", tmp_path / "public.der", "-pubout", "-out", public)
    uri = f"pkcs11:token=release;object=signer;id=%01?module-path={SOFTHSM}&pin-value=1234"
    sign_bundle(Bundle.open(release), open_signatory(KeyFiles(pkcs11=uri)), counter=8, golden=False, progress=Silent())
    assert outcome(release, key=public, newer=7).code == 0
    with pytest.raises(InputError, match="token"):
        open_signatory(KeyFiles(pkcs11=uri.replace("object=signer", "object=nobody").replace(";id=%01", "")))
    with pytest.raises(InputError, match="token"):
        open_signatory(KeyFiles(pkcs11="pkcs11:"))


def statement(bundle: Path, name: str, keys: Pair) -> dict[str, Any]:
    """What an attestation states; securesystemslib verifies the envelope."""
    table = json.loads((bundle / "attestations" / name).read_bytes())
    envelope = Envelope.from_dict(table)
    key = SSlibKey.from_crypto(load_pem_public_key(keys.public.read_bytes()))
    # Signatures of model-signing name no key.
    key.keyid = ""
    assert envelope.verify([key], 1)
    stated: dict[str, Any] = json.loads(envelope.payload)
    assert envelope.payload_type == "application/vnd.in-toto+json"
    assert stated["_type"] == "https://in-toto.io/Statement/v1"
    assert stated["subject"] == [{"name": "bundle.json", "digest": {"sha256": sha256(bundle / "bundle.json")}}]
    return stated


def test_a_changed_attestation_does_not_hold(release: Path, keys: Pair) -> None:
    path = release / "attestations" / "provenance.json"
    table = json.loads(path.read_bytes())
    payload = base64.b64decode(table["payload"]).replace(b"glm", b"gpt", 1)
    path.write_text(json.dumps({**table, "payload": base64.b64encode(payload).decode()}))
    with pytest.raises(VerificationError):
        statement(release, "provenance.json", keys)


def test_provenance_names_what_the_bundle_was_made_from(signed: Path, keys: Pair) -> None:
    stated = statement(signed, "provenance.json", keys)
    assert stated["predicateType"] == "https://slsa.dev/provenance/v1"
    manifest, built = read_manifest(signed), stated["predicate"]["buildDefinition"]
    materials = {each["annotations"]["is"]: each["digest"] for each in built["resolvedDependencies"]}
    assert manifest.calibration
    assert materials == {
        "checkpoint": {"sha256": manifest.source.digest.removeprefix("sha256:")},
        "token ids": {"sha256": manifest.calibration.digest.removeprefix("sha256:")},
    }
    assert built["externalParameters"]["recipe"] == json.loads(manifest.recipe.model_dump_json())
    assert built["internalParameters"]["bundleDigest"] == manifest.digest()
    assert "torch" in stated["predicate"]["runDetails"]["builder"]["version"]


def test_the_test_result_is_the_report_s(signed: Path, keys: Pair) -> None:
    stated = statement(signed, "test-result.json", keys)
    report, predicate = read_report(signed / "report.json"), stated["predicate"]
    assert stated["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert predicate["result"] == {"PASS": "PASSED", "WARN": "WARNED"}.get(report.verdict, "FAILED")
    assert predicate["configuration"][0]["digest"] == {"sha256": sha256(signed / "report.json")}
    named = [name for key in ("passedTests", "warnedTests", "failedTests") for name in predicate.get(key, [])]
    assert len(named) == len(report.gates)


def test_the_bill_of_materials_follows_the_schema(signed: Path, keys: Pair) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    stated = statement(signed, "ml-bom.json", keys)
    assert stated["predicateType"] == "https://cyclonedx.org/bom"
    bill = stated["predicate"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    broken = {**bill, "components": [{"type": "model"}]}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None
    named = {component["name"]: component for component in bill["components"]}
    assert named["chat_template.jinja"]["description"] == "chat template"
    assert named["tokenizer.json"]["hashes"] == [{"alg": "SHA-256", "content": sha256(signed / "tokenizer.json")}]
    assert named["calibration text"]["type"] == "data"
    card = bill["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["architectureFamily"] == "glm4"
    languages = {metric["slice"] for metric in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert languages == set(read_report(signed / "report.json").subject.languages)


def test_a_bill_of_a_fine_tune_on_text_of_one_s_own(sample: Sample) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    manifest = read_manifest(sample.bundle)
    assert manifest.calibration
    adapter = AdapterSource(name="ours", digest="sha256:" + "1" * 64)
    tuned = manifest.model_copy(
        update={
            "source": manifest.source.model_copy(update={"adapter": adapter}),
            "calibration": manifest.calibration.model_copy(update={"own": ("x",)}),
        }
    )
    bill = bill_of_materials(tuned, None)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    named = {component["name"]: component for component in bill["components"]}
    assert named["ours"]["hashes"][0]["content"] == "1" * 64
    assert "data" not in named["calibration text"]
    plain = bill_of_materials(manifest.model_copy(update={"calibration": None}), None)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(plain)) is None
    assert bill_of_materials(manifest, None) == bill_of_materials(manifest, None)


def test_the_command_line(run: Run, sample: Sample, keys: Pair, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    told = run("verify", bundle, "--key", keys.public)
    assert told.code == EXIT_UNVERIFIED and "model.sig" in told.stderr
    told = run("sign", bundle, "--key", keys.private, "--counter", "3", "--no-golden", "--json")
    assert told.code == 0, told.stderr
    assert told.document["counter"] == 3 and told.document["signer"] == "key"
    told = run("verify", bundle, "--key", keys.public, "--newer-than", "2", "--json")
    assert told.code == 0 and told.document["digest"] == read_manifest(bundle).digest()
    assert run("verify", bundle, "--key", keys.public, "--newer-than", "3").code == EXIT_UNVERIFIED
    assert run("sign", bundle, "--key", keys.private, "--counter", "3").code == EXIT_INPUT
    for arguments in ([], ["--pkcs11", "x", "--key", keys.private], ["--key", keys.private, "--certificate", "x"]):
        assert run("sign", bundle, *arguments).code == EXIT_INPUT
    assert run("sign", tmp_path, "--key", keys.private).code == EXIT_INPUT
    for arguments in ([], ["--key", keys.public, "--root", "x"]):
        assert run("verify", bundle, *arguments).code == EXIT_INPUT


def test_a_new_report_breaks_the_signature_and_says_so(run: Run, sample: Sample, release: Path, outcome: Judge) -> None:
    told = run("report", "render", release)
    assert told.code == 0 and "signature" not in told.stderr and outcome(release).code == 0
    told = run("validate", release, "--against", sample.checkpoint)
    assert "its signature no longer holds; sign it again" in told.stderr
    assert "report" in outcome(release)
    told = run("report", "render", release.parent / "nowhere")
    assert told.code == EXIT_INPUT


def test_without_the_library_its_extra_is_named(release: Path, keys: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.sys.modules, "model_signing.signing", None)  # type: ignore[attr-defined]
    with pytest.raises(MachineError, match=r"glmexport\[sign\]"):
        open_signatory(KeyFiles(keys.private))
