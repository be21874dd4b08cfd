"""Whether a bundle ran where it is meant to run: on its target's provider, on its target's class of hardware."""

from __future__ import annotations

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.fit import lacking_memory
from glmexport.foundation.host import Host
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.validation.gates import counted


def provider_gate(bundle: Bundle) -> Gate:
    """Return the gate of a bundle that nobody ran on its target's provider, and that is neither right nor wrong."""
    provider, reason = bundle.target.provider.name, lacking_memory(bundle)
    if not bundle.runs_here or reason is None:
        reason = f"{provider} is not on this machine"
    return counted(
        "Runs on the target's provider",
        None,
        0,
        1,
        "runs",
        f"not run on the device: {reason}",
        at_least=True,
        otherwise=Verdict.INCONCLUSIVE,
    )


def host_gate(bundle: Bundle) -> tuple[Gate, ...]:
    """Return a WARN where the target's provider is here, but the machine is of another class than the target.

    Correctness carries over between processors, speed and the last digits do not. There is no gate where the machine
    is of that class.
    """
    lacking = bundle.target.lacking(Host.this())
    if not lacking or not bundle.runs_here:
        return ()
    sample = f"another class of hardware than {bundle.target.name}: {' '.join(lacking)}"
    return (
        counted(
            "Runs on the target's hardware", None, 0, 1, "runs", sample, at_least=True, otherwise=Verdict.WARN
        ),
    )
