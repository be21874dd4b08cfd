"""The machine-learning bill of materials of a bundle, in the form of CycloneDX 1.6.

Written here since the library for CycloneDX knows no modelCard; its schema judges what is written.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from glmexport import __version__
from glmexport.bundle.manifest import FileEntry, Manifest
from glmexport.report.document import Report

BOM_TYPE = "https://cyclonedx.org/bom"
#: Files that become prompts: who changes one of them changes the model, with every weight as it was.
_TEXT = {
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer configuration",
    "chat_template.jinja": "chat template",
}
#: Namespace of serial numbers, which follow from the bundle's digest: the same bundle has the same one.
_NAMESPACE = uuid.UUID("6ff0c7c1-6b3f-4a3e-9a36-5c1d0f2f7a11")


def bill_of_materials(manifest: Manifest, report: Report | None) -> dict[str, Any]:
    """Return the BOM as a JSON object."""
    digest = manifest.digest()
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": digest,
        "name": f"{manifest.source.title}, {manifest.recipe.name} for {manifest.target.name}",
        "version": digest.partition(":")[2],
        "hashes": _hashes(digest),
        "modelCard": _card(manifest, report),
    }
    components = list(_components(manifest))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [{"type": "application", "name": "glmexport", "version": __version__}]},
        },
        "components": components,
        "dependencies": [
            {"ref": digest, "dependsOn": [component["bom-ref"] for component in components]},
            *({"ref": component["bom-ref"]} for component in components),
        ],
    }


def _components(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the original, its adapter, the text it was calibrated on, and every file."""
    source, calibration = manifest.source, manifest.calibration
    yield _component(
        "machine-learning-model", "source", source.name, "The checkpoint before quantization.", source.digest
    )
    if source.adapter:
        adapter = source.adapter
        yield _component("machine-learning-model", "adapter", adapter.name, "A merged LoRA adapter.", adapter.digest)
    if calibration:
        what = f"{calibration.tokens} tokens in {', '.join(sorted(calibration.tokens_per_language))}."
        # Text of the user's own is nobody else's business, and how public it is nobody but the user knows.
        public = {} if calibration.own else {"data": [{"type": "dataset", "classification": "public"}]}
        yield _component("data", "calibration", "calibration text", what, calibration.digest) | public
    for file in manifest.files:
        yield _file(file)


def _component(kind: str, reference: str, name: str, description: str, digest: str) -> dict[str, Any]:
    return {
        "type": kind,
        "bom-ref": reference,
        "name": name,
        "description": description,
        "hashes": _hashes(digest),
    }


def _file(file: FileEntry) -> dict[str, Any]:
    template = file.path.endswith(".jinja")
    what = _TEXT.get(file.path, "chat template" if template else "")
    described = {"description": what} if what else {}
    return {
        "type": "file",
        "bom-ref": f"file:{file.path}",
        "name": file.path,
        **described,
        "hashes": _hashes(file.sha256),
    }


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest.rpartition(":")[2]}]


def _card(manifest: Manifest, report: Report | None) -> dict[str, Any]:
    """Return what the model is for whom, and how close it is to the original, language by language."""
    precision = manifest.precision
    datasets = [{"ref": "calibration"}] if manifest.calibration else []
    card: dict[str, Any] = {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": manifest.family,
            "modelArchitecture": manifest.source.model_type,
            "datasets": datasets,
            "inputs": [{"format": "token ids"}],
            "outputs": [{"format": "logits"}],
        },
        "properties": [
            {"name": "glmexport:recipe", "value": manifest.recipe.name},
            {"name": "glmexport:recipe-digest", "value": manifest.recipe.digest()},
            {"name": "glmexport:target", "value": manifest.target.name},
            {"name": "glmexport:context-length", "value": str(manifest.context_length)},
            {"name": "glmexport:parameters", "value": str(manifest.source.parameters)},
            {"name": "glmexport:bits-per-weight", "value": f"{precision.bits_per_weight:.4f}"},
        ],
    }
    if report:
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": name, "value": f"{value:.6g}", "slice": row.language}
                for row in report.fidelity.languages
                for name, value in (
                    ("KL divergence from the original, mean, nats per token", row.kl_mean_nats),
                    ("top-1 agreement with the original", row.top1_agreement),
                    ("perplexity", row.perplexity_bundle),
                )
            ]
        }
        card["considerations"] = {"technicalLimitations": list(report.limits)}
    return card
