"""What a server carries: the size of its installation, what starting costs, its memory, and its first two chats.

    python -m benchmarks.footprint BUNDLE [--before ROOT PYTHON] [--rounds N] [--output FILE]

This checkout is installed with the extra serve into a fresh environment. ROOT is another checkout, whose code is run by
PYTHON, in an environment that has what it needs; its size is that of the distributions that glmexport[serve] asks for
there, and what they ask for. Sizes are of the files that pip wrote, compiled modules included, without pip itself.
The import is of the command line and the server, CPU seconds of the whole process. Ready is when the server has printed
its address. Memory is of the server and its processes after the second chat, less the bytes of the graph and weights.
Each round starts both servers anew, one after the other. A figure is a median, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from glmexport.bundle.manifest import read_manifest
from glmexport.foundation import machine

MIB = 2**20
ROOT = Path(__file__).parents[1]
#: The bars, by figure.
BARS = {"installed_mib": 260.0, "import_cpu_s": 0.8, "pss_beyond_mib": 150.0, "rss_beyond_mib": None}
#: Distributions that are shown by themselves.
_SHOWN = 12

#: Run by the environment's own interpreter: what the requirements on its command line amount to there, in bytes.
SIZES = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement

sizes, waiting = {}, [Requirement(each) for each in sys.argv[1:]]
seen = set()
while waiting:
    asked = waiting.pop()
    for extra in {"", *asked.extras}:
        if (asked.name, extra) in seen or (asked.marker and not asked.marker.evaluate({"extra": ""})):
            continue
        seen.add((asked.name, extra))
        try:
            found = distribution(asked.name)
        except PackageNotFoundError:
            continue
        paths = [found.locate_file(file) for file in found.files or ()]
        sizes[found.name] = sum(path.stat().st_size for path in paths if path.is_file())
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                needed.marker = None
                waiting.append(needed)
print(json.dumps(sizes))
"""
IMPORT = "import glmexport.cli.main, glmexport.serving.server, os; print(sum(os.times()[:2]))"
#: Two messages, as a prompt that was computed before is gone on with. Each comes first in every other round.
MESSAGES = ("Hello there!", "Thank you!")


@dataclass
class Side:
    """A checkout's code in an environment, and what was measured of it."""

    name: str
    python: Path
    #: None: as it is installed in the environment.
    root: Path | None
    distributions: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What the side's processes are started with."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        return inherited | ({"PYTHONPATH": str(self.root)} if self.root else {})

    def run(self, *arguments: str) -> str:
        """Return what a program of its interpreter prints."""
        command = [str(self.python), *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def add(self, figures: Mapping[str, float]) -> None:
        """Keep the figures of a round."""
        for name, value in figures.items():
            self.samples.setdefault(name, []).append(value)


def installed(place: Path) -> Side:
    """Return this checkout, installed with the extra serve into an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    side = Side("after", python, None)
    side.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[serve]")
    side.distributions = json.loads(side.run("-c", SIZES, "glmexport[serve]"))
    return side


def other(root: Path, python: Path) -> Side:
    """Return another checkout, run in an environment that has more than it needs."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    side = Side("before", python, root)
    asked = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    side.distributions = json.loads(side.run("-c", SIZES, *asked))
    own = sum(path.stat().st_size for path in (root / "glmexport").rglob("*") if path.is_file())
    side.distributions["glmexport"] = own
    return side


@contextmanager
def served(side: Side, bundle: Path, threads: int) -> Iterator[tuple[psutil.Process, HTTPConnection, float]]:
    """Start a server; yield its process, a connection to it, and the seconds that it took to be ready."""
    command = [str(side.python), "-m", "glmexport", "serve", str(bundle), "--port", "0", "--json"]
    command += ["--threads", str(threads)]
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=side.environment, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            ready = time.perf_counter() - started
            host, _, port = said["url"].removeprefix("http://").rpartition(":")
            yield psutil.Process(process.pid), HTTPConnection(host, int(port), timeout=120), ready
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def chat(connection: HTTPConnection, message: str) -> float:
    """Return the seconds of a chat."""
    asked = {"messages": [{"role": "user", "content": message}], "max_tokens": 16, "temperature": 0}
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    seconds = time.perf_counter() - started
    assert answer["usage"]["completion_tokens"] > 0, answer
    return seconds


def one_round(
    side: Side, bundle: Path, model_bytes: int, threads: int, messages: Sequence[str]
) -> dict[str, float]:
    """Return the figures of a process that imports, and of a server."""
    figures = {"import_cpu_s": float(side.run("-c", IMPORT))}
    with served(side, bundle, threads) as (process, connection, ready):
        times = process.cpu_times()
        figures |= {"ready_s": ready, "ready_cpu_s": times.user + times.system}
        figures |= {"first_chat_s": chat(connection, messages[0]), "second_chat_s": chat(connection, messages[1])}
        figures["first_less_second_s"] = figures["first_chat_s"] - figures["second_chat_s"]
        memory = [each.memory_full_info() for each in (process, *process.children(recursive=True))]
        figures["pss_beyond_mib"] = (sum(each.pss for each in memory) - model_bytes) / MIB
        figures["rss_beyond_mib"] = (sum(each.rss for each in memory) - model_bytes) / MIB
        figures["pss_beyond_of_server_mib"] = (memory[0].pss - model_bytes) / MIB
    return figures


def summary(side: Side) -> dict[str, Any]:
    """Return the figures of a side, each with its range, its sample size and its bar."""
    total = sum(side.distributions.values()) / MIB
    rows: dict[str, Any] = {"installed_mib": {"n": 1, "median": round(total, 1), "bar": BARS["installed_mib"]}}
    for name, values in side.samples.items():
        ordered = sorted(values)
        rows[name] = {
            "n": len(values),
            "median": round(median(values), 4),
            "lowest": round(ordered[0], 4),
            "highest": round(ordered[-1], 4),
            "bar": BARS.get(name),
        }
    # The second lowest and highest of 9 or more hold the median with 96 % and more.
    differences = sorted(side.samples["first_less_second_s"])
    if len(differences) >= 9:
        rows["first_less_second_s"]["interval_of_median"] = [round(differences[i], 4) for i in (1, -2)]
    largest = sorted(side.distributions.items(), key=lambda item: -item[1])
    return {"figures": rows, "distributions_mib": {name: round(size / MIB, 1) for name, size in largest}}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table."""
    names = [*next(iter(found.values()))["figures"]]
    yield f"{'':26}" + "".join(f"{side:>34}" for side in found) + f"{'bar':>8}"
    for name in names:
        cells, bar = [], None
        for side in found.values():
            row = side["figures"][name]
            bar = row["bar"]
            span = f" [{row['lowest']:.3f}, {row['highest']:.3f}]" if "lowest" in row else ""
            cells.append(f"{row['median']:.3f}{span} n={row['n']}")
        yield f"{name:26}" + "".join(f"{cell:>34}" for cell in cells) + f"{'' if bar is None else bar:>8}"
    for name, side in found.items():
        largest = list(side["distributions_mib"].items())[:_SHOWN]
        yield f"largest, {name} (MiB): " + ", ".join(f"{each} {size:.1f}" for each, size in largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--before", nargs=2, type=Path, metavar=("ROOT", "PYTHON"), help="another checkout, and where")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of the servers")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    manifest = read_manifest(bundle)
    model = [bundle / "model.onnx", *(bundle / "weights").glob("*")]
    model_bytes = sum(path.stat().st_size for path in model if path.is_file())
    with tempfile.TemporaryDirectory(prefix="footprint-") as place:
        sides: Sequence[Side] = [installed(Path(place) / "environment")]
        if options.before:
            sides = [other(*options.before), *sides]
        for index in range(options.rounds):
            messages = MESSAGES if index % 2 else MESSAGES[::-1]
            for side in sides:
                side.add(one_round(side, bundle, model_bytes, options.threads, messages))
        found = {side.name: summary(side) for side in sides}
    print("\n".join(table(found)))
    document = {
        "command": "python -m benchmarks.footprint",
        "date": datetime.now(UTC).date().isoformat(),
        "bundle": f"{manifest.source.title}, {manifest.recipe.name}, {manifest.target.name}",
        "model_bytes": model_bytes,
        "processor": machine.processor_name(),
        "threads": options.threads,
        "versions": machine.library_versions(),
        **found,
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
