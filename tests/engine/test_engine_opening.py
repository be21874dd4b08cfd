"""A bundle that onnxruntime-genai runs takes along no second ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys

from builds import Sample

PROGRAM = """
import sys
from pathlib import Path
from glmexport.bundle.bundle import Bundle
from glmexport.engine.opening import open_engine
import glmexport.serving.server

engine = open_engine(Bundle.open(Path(sys.argv[1])), 1)
assert engine.label.startswith("onnxruntime-genai")
print(*(name for name in sys.modules if name.partition(".")[0] == "onnxruntime"))
"""


def test_the_python_package_onnxruntime_is_not_imported(sample: Sample) -> None:
    """It maps libraries of 20 MiB that onnxruntime-genai has once more; only other loops need it."""
    command = [sys.executable, "-c", PROGRAM, str(sample.bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
