"""Whether a bundle ran where it is meant to run: on its target's provider, on its target's class of hardware."""

from __future__ import annotations

from glmexport.bundle.manifest import Manifest
from glmexport.foundation.host import Host
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.validation.gates import counted


def provider_gate(manifest: Manifest) -> Gate:
    """A bundle that nobody ran on its target's provider is neither right nor wrong."""
    provider = manifest.target.provider.name
    return counted(
        "Runs on the target's provider",
        None,
        0,
        1,
        "runs",
        f"not run on the device: {provider} is not on this machine",
        at_least=True,
        otherwise=Verdict.INCONCLUSIVE,
    )


def host_gate(manifest: Manifest) -> tuple[Gate, ...]:
    """A WARN where the provider is here, but the machine is of another class than the target: correctness carries over
    between processors, speed and the last digits do not. Nothing where it is of that class.
    """
    lacking = manifest.target.lacking(Host.this())
    if not lacking or manifest.target.provider.name not in Host.this().providers:
        return ()
    sample = f"another class of hardware than {manifest.target.name}: {' '.join(lacking)}"
    return (
        counted(
            "Runs on the target's hardware", None, 0, 1, "runs", sample, at_least=True, otherwise=Verdict.WARN
        ),
    )
