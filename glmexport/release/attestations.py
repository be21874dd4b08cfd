"""Attestations of a bundle as predicates of in-toto: how it was made, and how it was judged.

The signer attests what it was told by the bundle's own manifest and report. That is level 1 of SLSA's build track: a
machine that signs its own work cannot vouch for itself.
"""

from __future__ import annotations

from typing import Any

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import MANIFEST, Manifest
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.report.document import JSON_NAME, Report, read_report
from glmexport.results.record import Verdict

PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
TEST_RESULT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
_BUILD_TYPE = "urn:glmexport:build:v1"
_BUILDER = "urn:glmexport:builder:unattested-host"
#: Verdicts in the predicate's words. Who gates by it lets a warning pass, so what is not decided cannot be one.
_RESULTS = {
    Verdict.PASS: "PASSED",
    Verdict.WARN: "WARNED",
    Verdict.INCONCLUSIVE: "FAILED",
    Verdict.BLOCK: "FAILED",
}


def subject(bundle: Bundle) -> dict[str, str]:
    """Return the SHA-256 of the manifest, which lists every other file that a bundle consists of."""
    return {MANIFEST: sha256(bundle.path(MANIFEST))}


def provenance(manifest: Manifest, report: Report | None) -> dict[str, Any]:
    """Return the predicate of SLSA provenance v1: from which checkpoint, text and recipe the bundle was made."""
    source, calibration = manifest.source, manifest.calibration
    materials = [{"name": source.name, "digest": _digest(source.digest), "annotations": {"is": "checkpoint"}}]
    if source.adapter:
        adapter = source.adapter
        materials.append(
            {"name": adapter.name, "digest": _digest(adapter.digest), "annotations": {"is": "LoRA adapter"}}
        )
    if calibration:
        materials.append(
            {"name": "calibration text", "digest": _digest(calibration.digest), "annotations": {"is": "token ids"}}
        )
    versions = report.versions if report else {}
    return {
        "buildDefinition": {
            "buildType": _BUILD_TYPE,
            "externalParameters": {
                "checkpoint": source.name,
                "recipe": manifest.recipe.model_dump(mode="json"),
                "target": manifest.target.name,
            },
            "internalParameters": {
                "family": manifest.family,
                "recipeDigest": manifest.recipe.digest(),
                "bundleDigest": manifest.digest(),
            },
            "resolvedDependencies": materials,
        },
        "runDetails": {
            "builder": {"id": _BUILDER, "version": {"glmexport": manifest.glmexport, **versions}},
            "metadata": {},
        },
    }


def test_result(bundle: Bundle, report: Report) -> dict[str, Any]:
    """Return the predicate of in-toto's test-result v0.1: the verdict of report.json, and the gates by theirs."""
    by_result: dict[str, list[str]] = {"PASSED": [], "WARNED": [], "FAILED": []}
    for gate in report.gates:
        name = f"{gate.name} ({gate.language})" if gate.language else gate.name
        by_result[_RESULTS[gate.verdict]].append(name)
    gates = {"policy": report.policy.source, "verdict": str(report.verdict), "glmexport": report.glmexport_version}
    digest = {"sha256": sha256(bundle.path(JSON_NAME))}
    return {
        "result": _RESULTS[report.verdict],
        "configuration": [{"name": JSON_NAME, "digest": digest, "annotations": gates}],
        "passedTests": by_result["PASSED"],
        "warnedTests": by_result["WARNED"],
        "failedTests": by_result["FAILED"],
    }


def report_of(bundle: Bundle) -> Report | None:
    """Return the report that is in the bundle; None if there is none.

    Raises:
        BundleError: it cannot be read, or is of another bundle.
    """
    path = bundle.path(JSON_NAME)
    if not path.is_file():
        return None
    report = read_report(path)
    if report.subject.bundle_digest != bundle.digest:
        raise BundleError(
            f"{path} is of another bundle ({report.subject.bundle_digest}).",
            next_step="Validate this bundle, or remove the report.",
        )
    return report


def _digest(digest: str) -> dict[str, str]:
    """Return a digest of this package in in-toto's form."""
    kind, _, value = digest.partition(":")
    return {kind: value}
