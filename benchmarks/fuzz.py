"""How long every reader of strangers' bytes was fuzzed, and what was found.

    pip install 'atheris>=3,<4'
    python -m benchmarks.fuzz [TARGET ...] [--seconds N] [--output FILE]

Runs tests/fuzz/fuzz_readers.py, one target after the other, and adds to what FILE has of other targets. Inputs that
take more than the limits there, or raise what is no sentence for the user, are kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import glmexport

_PROGRAM = Path(__file__).parents[1] / "tests" / "fuzz" / "fuzz_readers.py"
_KEPT = Path("build") / "fuzz"


def outcome(log: str) -> dict[str, Any]:
    """Inputs tried, seconds, edges covered and the findings, of what libFuzzer prints."""
    done = re.search(r"Done (\d+) runs in (\d+) second", log)
    tried = re.findall(r"^#(\d+)\s.* cov: (\d+)", log, re.MULTILINE)
    return {
        "inputs": int(done[1]) if done else int(tried[-1][0]) if tried else 0,
        "seconds": int(done[2]) if done else None,
        "edges": int(tried[-1][1]) if tried else 0,
        "finding": next(iter(re.findall(r"Uncaught Python exception: ===\n(.*)", log)), None),
    }


def fuzz(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz one target."""
    corpus = _KEPT / target
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={_KEPT}/"]
    done = subprocess.run(
        [sys.executable, _PROGRAM, target, str(corpus), *options], capture_output=True, text=True, check=False
    )
    return outcome(done.stdout + done.stderr)


def main() -> None:
    """Fuzz, print a line a target, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.is_file() else {}
    for target in given.targets:
        rows[target] = row = fuzz(target, given.seconds)
        sys.stdout.write(f"{target:18} {row['inputs']:>9,} inputs  {row['finding'] or 'nothing found'}\n")
    write(given.output, rows)


def write(path: Path, rows: dict[str, Any]) -> None:
    """Write ``rows`` by target."""
    document = {"command": "python -m benchmarks.fuzz", "glmexport": glmexport.__version__, "rows": rows}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
