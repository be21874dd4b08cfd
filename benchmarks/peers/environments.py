"""One virtual environment a peer, so that no peer's requirements decide another's versions.

    python -m benchmarks.peers.environments FOLDER [NAME ...]

Every environment has the torch of the main one, and its transformers where the peer allows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

#: Pinned in every environment. Unpinned, torch would resolve to a build with CUDA: gigabytes that no peer needs here.
SHARED = ("torch==2.13.0", "safetensors>=0.8,<0.9")
_TRANSFORMERS = "transformers==5.23.0"

#: What each environment adds, by its name.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    # optimum lets transformers load what gptqmodel saves.
    "gptqmodel": (_TRANSFORMERS, "gptqmodel==7.6.*", "optimum>=2,<3"),
    "auto-round": (_TRANSFORMERS, "auto-round==0.16.*"),
    "onnxruntime": (_TRANSFORMERS, "onnxruntime==1.32.*", "onnx>=1.23,<1.24", "onnx-ir>=1.1,<1.2"),
    "hqq": (_TRANSFORMERS, "hqq==0.2.8.post1"),
    "nncf": (_TRANSFORMERS, "nncf==3.4.*"),
    # Of wheels with llama.cpp, the one whose library exports ggml's quantizer; releases are llama.cpp's builds.
    "llama-cpp": (_TRANSFORMERS, "xllamacpp==2026.10.11549", "gguf==0.19.*"),
    # For its speed. optimum-intel refuses transformers above 5.5.
    "openvino": ("transformers==5.5.4", "openvino==2026.4.*", "optimum-intel==2.2.*", "nncf==3.4.*"),
    # It refuses transformers above 5.17.
    "llm-compressor": ("transformers==5.17.0", "llmcompressor==0.14.*"),
}

_MARKER = ".ready"
_SECONDS = 1800


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; the message ends with the installer's last lines."""


def interpreter(folder: Path, name: str) -> Path:
    """The Python of an environment, whether or not it exists yet."""
    return folder / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def ready(folder: Path, name: str) -> dict[str, str] | None:
    """Versions in an environment that is complete for today's requirements; None if it has to be made."""
    try:
        record = json.loads((folder / name / _MARKER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if record.get("requirements") != [*SHARED, *REQUIREMENTS[name]]:
        return None
    versions: dict[str, str] = record["versions"]
    return versions


def create(folder: Path, name: str) -> dict[str, str]:
    """Make an environment unless it is there, and return the versions in it.

    Raises:
        EnvironmentFailed: the installer failed or took too long.
    """
    found = ready(folder, name)
    if found is not None:
        return found
    place = folder / name
    (place / _MARKER).unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(place)])
    python = interpreter(folder, name)
    requirements = [*SHARED, *REQUIREMENTS[name]]
    _run([str(python), "-m", "pip", "install", "--quiet", *requirements])
    listing = _run([str(python), "-m", "pip", "list", "--format", "json"])
    versions = {row["name"].lower(): row["version"] for row in json.loads(listing)}
    record = {"requirements": requirements, "versions": versions}
    # Last, so that an environment whose installation was cut off is made again.
    partial = place / f"{_MARKER}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.rename(place / _MARKER)
    return versions


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailed(f"{' '.join(command)}: longer than {_SECONDS} s") from error
    if done.returncode:
        raise EnvironmentFailed(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(REQUIREMENTS)}")
    options = parser.parse_args()
    for name in options.names or REQUIREMENTS:
        versions = create(options.folder, name)
        print(f"{name}: {len(versions)} packages, torch {versions['torch']}")


if __name__ == "__main__":
    main()
