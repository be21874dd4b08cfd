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
    "glmexport-demo": "demo",
    "gptqmodel": "gptq",
    "huggingface_hub": "build",
    "lm_eval": "lm-eval",
    "matplotlib": "peers",
    "model_signing": "sign",
    "onnx": "build",
    "onnx_ir": "build",
    "openvino": "openvino",
    "optimum": "gptq",
    "playwright": "browser",
    "prometheus_client": "serve",
    "py3langid": "build",
    "regex": "build",
    "sacrebleu": "build",
    "safetensors": "build",
    "scipy": "build",
    "starlette": "serve",
    "tomli_w": "build",
    "torch": "build",
    "transformers": "build",
    "uvicorn": "serve",
}
#: The torch that pip takes by itself on Linux brings gigabytes of CUDA.
_CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def missing_package(error: ImportError, extra: str | None = None) -> MachineError | None:
    """Return the error for a package that cannot be imported; None where it is ours, or Python's, and so a bug.

    Args:
        error: What the import raised.
        extra: The extra that brings it, where the package alone does not tell.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name == "glmexport" or name in sys.stdlib_module_names:
        return None
    known = extra or EXTRAS.get(name)
    missing = isinstance(error, ModuleNotFoundError)
    step = f"pip install 'glmexport[{known}]'" if known else f"pip install {name}"
    if known == "build":
        step += f"; on a machine without a GPU first: {_CPU_TORCH}"
    return MachineError(
        f"The Python package {name} {'is not installed' if missing else f'cannot be used here: {error}'}.",
        next_step=step,
    )
