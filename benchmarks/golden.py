"""Record the SHA-256 of every file of a set of bundles, and compare two records: a change of form changes no byte.

    python -m benchmarks.golden record OUTPUT.json [NAME ...]
    python -m benchmarks.golden compare BEFORE.json AFTER.json

Digests depend on the processor, since its matrix products add in an order of their own: record both on one machine.
Products are torch's default whatever the machine would choose, so that the same machine always computes the same.
The manifest and the report are left out. They hold versions and times.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import builds  # noqa: E402
import models  # noqa: E402
import predicting  # noqa: E402

from glmexport.results.arithmetic import UNCHECKED  # noqa: E402

MIXTURE = ROOT / "benchmarks/moe_checkpoint/checkpoint"
DEMO = Path("demo")
AVX2 = "x86-avx2"
#: What every build writes anew.
WRITTEN_ANEW = ("bundle.json", "report.json", "report.html", "report.md", "report.xml")
#: Checkpoint, recipe and target.
Made = tuple[Path, str, str]


def bundles(scratch: Path) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield each bundle's name and a function that returns what it is made of."""
    for recipe in ("w4g32", "w4g128-sym", "small", "fp32", "rtn-w4g32"):
        yield f"demo-{recipe}", lambda recipe=recipe: (DEMO, recipe, AVX2)
    yield "moe-w4g128", lambda: (MIXTURE, "w4g128", AVX2)
    for family, changes in models.TINY.items():
        yield f"family-{family}", lambda family=family, changes=changes: _random(scratch, family, changes)
    for family, changes in predicting.PREDICTING.values():
        yield f"predicting-{family}", lambda family=family, changes=changes: _predicting(scratch, family, changes)
    for path in sorted((ROOT / "targets").glob("*.toml")):
        yield f"target-{path.stem}", lambda path=path: (DEMO, _default_recipe(path), path.stem)


def _random(scratch: Path, family: str, changes: dict[str, Any]) -> Made:
    models.write_checkpoint(scratch / family, family, **changes)
    return scratch / family, str(builds.write_recipe(scratch)), AVX2


def _predicting(scratch: Path, family: str, changes: dict[str, Any]) -> Made:
    directory = scratch / f"predicting-{family}"
    models.write_predicting(directory, family, num_hidden_layers=2, **changes)
    return directory, str(builds.write_recipe(scratch)), AVX2


def _default_recipe(target: Path) -> str:
    """Return the recipe that a target names, or that the one which it extends names."""
    content = tomllib.loads(target.read_text(encoding="utf-8"))
    named = content.get("weights", {}).get("default_recipe")
    return str(named) if named else _default_recipe(target.with_name(f"{content['extends']}.toml"))


def record(output: Path, names: list[str]) -> None:
    """Build every bundle, or those of ``names``, and write their digests; what ``output`` has already is kept."""
    found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    found["processor"] = _processor()
    with tempfile.TemporaryDirectory() as folder:
        for name, prepare in bundles(Path(folder)):
            if (names and name not in names) or name in found:
                continue
            print(name, file=sys.stderr, flush=True)
            checkpoint, recipe, target = prepare()
            directory = Path(folder) / "bundles" / name
            try:
                builds.build(checkpoint, directory, recipe, (target,), arithmetic=UNCHECKED)
            except AssertionError:
                # A bundle for a runtime that is not on this machine is written and not run.
                assert directory.is_dir()
            found[name] = {
                path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(directory.rglob("*"))
                if path.is_file() and path.name not in WRITTEN_ANEW
            }
            output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(before: Path, after: Path) -> int:
    """Print every file of the bundles in both records that differs; return 1 if there is one."""
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    names = sorted({*first} & {*second} - {"processor"})
    files = 0
    differing = []
    for name in names:
        one, other = (
            {file: digest for file, digest in each[name].items() if file not in WRITTEN_ANEW}
            for each in (first, second)
        )
        files += len(one)
        differing += [f"{name}/{file}" for file in sorted({*one, *other}) if one.get(file) != other.get(file)]
    print(*differing, sep="\n", end="\n" if differing else "")
    print(f"{len(names)} bundles, {files} files, {len(differing)} of them differ; {second['processor']}.")
    return bool(differing)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
