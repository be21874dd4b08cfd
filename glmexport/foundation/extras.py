"""Packages that glmexport needs for some commands only, and the extra that brings each."""

from __future__ import annotations

import sys

from glmexport.foundation.errors import MachineError

#: Extras by the name that is imported.
EXTRAS = {
    "OpenSSL": "sign",
    "PyKCS11": "pkcs11",
    "asyncssh": "devices",
    "auto_round": "peers",
    "gptqmodel": "gptq",
    "lm_eval": "lm-eval",
    "matplotlib": "peers",
    "model_signing": "sign",
    "openvino": "openvino",
    "optimum": "gptq",
    "playwright": "browser",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}


def lacking(error: ImportError, extra: str | None = None) -> MachineError | None:
    """Return the error for a package that cannot be imported; None where it is ours, or Python's, and so a bug.

    Args:
        error: of the import.
        extra: what brings it, where the package alone does not tell.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name == "glmexport" or name in sys.stdlib_module_names:
        return None
    known = extra or EXTRAS.get(name)
    missing = isinstance(error, ModuleNotFoundError)
    return MachineError(
        f"The Python package {name} {'is not installed' if missing else f'cannot be used here: {error}'}.",
        next_step=f"pip install 'glmexport[{known}]'" if known else f"pip install {name}",
    )
