"""A checkpoint of real size taken through every verb: time, processor time, memory and disk of each.

    python -m benchmarks.real_size CHECKPOINT FOLDER [--name NAME] [--recipe R] [--positions N] [--questions N]
        [--threads N] [--max-memory SIZE] [--kill-after BLOCKS] [--only VERB]... [--again VERB]... [--output FILE]

FOLDER gets the bundle, the image and its unpacked copy. Every verb is a process of its own. What a finished verb took
is written to FOLDER/NAME.json at once, and is not done again: after an interruption, or a crash of the machine, the
same command goes on, and the build with its last committed block. With --kill-after the build is killed without warning
each time that it has committed so many blocks more, and started again; all attempts count.

A build by stage: stages of the log, and of every block the seconds of capturing, solving and moving the text on. Peak
memory is what the kernel recorded of the process (VmHWM), and of its largest child; pages of mapped files count. The
verdict of a bundle of noise says nothing, so that a build that ends in BLOCK is a build that has ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.processes import Cost, Watched, glmexport, named
from glmexport.foundation import machine
from glmexport.foundation.files import write_atomically

GIB, MIB = 2**30, 2**20
PROMPT = "Write a short letter to a friend who has moved to another town."
TOKENS = 32
#: Exit codes of a verb that has done its work, whatever it found.
_DONE = (0, 1, 2)
_DISK_S = 10.0


class Journey:
    """A checkpoint on its way through the verbs, and the file that remembers how far it came."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bundle = self.folder / "bundle"
        self.image, self.unpacked = self.folder / "image", self.folder / "unpacked"
        self.state = self.folder / f"{options.name}.json"
        self.document: dict[str, Any] = {"command": "python -m benchmarks.real_size", "verbs": {}}
        if self.state.is_file():
            self.document = json.loads(self.state.read_text(encoding="utf-8"))
        self.document |= {
            "checkpoint": options.checkpoint.name,
            "checkpoint_bytes": _size(options.checkpoint),
            "processor": machine.processor_name(),
            "memory_bytes": machine.memory_bytes(),
            "threads": options.threads,
            "versions": machine.library_versions(),
        }

    @property
    def verbs(self) -> dict[str, Any]:
        """What is known of each verb."""
        known: dict[str, Any] = self.document["verbs"]
        return known

    def save(self) -> None:
        """Write what is known so far."""
        write_atomically(self.state, (json.dumps(self.document, indent=2) + "\n").encode())

    def go(self) -> None:
        """Take every verb that is asked for and not done yet."""
        for name, verb in VERBS.items():
            if self.options.only and name not in self.options.only:
                continue
            if name in self.options.again:
                self.verbs.pop(name, None)
            if not self.verbs.get(name, {}).get("finished"):
                print(f"{name} ...", flush=True)
                verb(self)
                self.save()
            print(_line(name, self.verbs[name]), flush=True)

    def watch(self, name: str, *arguments: object) -> None:
        """Run one verb and keep what it took; without its work done, this ends here."""
        self.keep(name, Watched(glmexport(name, *arguments), self.log(name)).finish())

    def keep(self, name: str, cost: Cost, **more: Any) -> None:
        """Remember the ``cost`` of a verb, and that it is done."""
        self.verbs[name] = {**cost.document(), **more, "finished": cost.exit_code in _DONE}
        self.save()
        if cost.exit_code not in _DONE:
            raise SystemExit(f"{name} ended with {cost.exit_code}; see {self.log(name)}")

    def log(self, name: str) -> Path:
        """Return the file of what a verb printed."""
        return self.folder / f"{name}.log"

    def passed(self, *names: str) -> list[object]:
        """Return those of the options that are passed on, where they are given."""
        given: list[object] = []
        for name in names:
            value = getattr(self.options, name.replace("-", "_"))
            if value is not None:
                given += [f"--{name}", value]
        return given


def inspect(journey: Journey) -> None:
    """Ask what the checkpoint is and what its build would take."""
    journey.watch("inspect", journey.options.checkpoint, *journey.passed("recipe", "threads", "max-memory"))


def build(journey: Journey) -> None:
    """Build the bundle, in as many attempts as it takes."""
    known = journey.verbs.setdefault("build", {"attempts": [], "blocks": {}})
    arguments = [journey.options.checkpoint, "--target", journey.options.target, "--output", journey.bundle]
    arguments += journey.passed("recipe", "positions", "questions", "threads", "max-memory")
    if "running" in known:
        # The machine itself, or this process, was stopped in the middle of it.
        known["attempts"].append(known.pop("running"))
    while not known.get("finished"):
        watched = Watched(glmexport("build", *arguments), journey.log("build"))
        try:
            cost = watched.finish(BuildWatch(journey, known).look)
        finally:
            known.pop("running", None)
            known["attempts"].append(watched.cost.document())
            journey.save()
        if not cost.killed and cost.exit_code not in _DONE:
            raise SystemExit(f"build ended with {cost.exit_code}; see {journey.log('build')}")
        known["finished"] = not cost.killed
    attempts = known["attempts"]
    known |= {name: sum(each[name] for each in attempts) for name in ("wall_s", "processor_s")}
    known |= {name: max(each[name] for each in attempts) for name in attempts[0] if name.endswith("_bytes")}
    known["exit_code"] = attempts[-1]["exit_code"]
    known["bundle_bytes"] = _size(journey.bundle)
    known["verdict"] = json.loads((journey.bundle / "report.json").read_text(encoding="utf-8"))["verdict"]


class BuildWatch:
    """A look at the work directory of a build: its committed blocks, its size, and whether it is to be killed now."""

    def __init__(self, journey: Journey, known: dict[str, Any]) -> None:
        self._journey, self._known = journey, known
        self._begun = len(known["blocks"])
        self._measured = 0.0

    def look(self, cost: Cost) -> bool:
        """Note what has been committed and the ``cost`` so far; return whether the process is to be killed."""
        known, journey = self._known, self._journey
        for record in journey.folder.glob(".glmexport-work-*/*.json"):
            if record.name != "job.json" and record.stem not in known["blocks"]:
                note = json.loads(record.read_text(encoding="utf-8"))["note"]
                known["blocks"][record.stem] = {key: note[key] for key in ("seconds", "stages") if key in note}
                journey.save()
        if time.monotonic() - self._measured > _DISK_S:
            self._measured = time.monotonic()
            work = sum(map(_size, journey.folder.glob(".glmexport-work-*")))
            written = sum(map(_size, journey.folder.glob("*bundle*")))
            for name, size in (("work_bytes", work), ("disk_bytes", work + written)):
                known[name] = max(known.get(name, 0), size)
            known["running"] = cost.document()
            journey.save()
        after = journey.options.kill_after
        return bool(after and len(known["blocks"]) - self._begun >= after)


def run(journey: Journey) -> None:
    """Let the bundle answer once."""
    journey.watch("run", journey.bundle, "--prompt", PROMPT, "--max-tokens", TOKENS, *journey.passed("threads"))


def serve(journey: Journey) -> None:
    """Serve the bundle, ask once over HTTP, and end the server."""
    command = glmexport("serve", journey.bundle, "--port", 0, "--json", *journey.passed("threads"))
    started = time.monotonic()
    watched = Watched(command, journey.log("serve"), subprocess.PIPE)
    assert watched.process.stdout is not None
    said = watched.process.stdout.readline()
    if not said:
        journey.keep("serve", watched.finish())
        return
    ready = time.monotonic() - started
    host, _, port = json.loads(said)["url"].removeprefix("http://").rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=3600)
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0}
    asked = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    answered = time.monotonic() - asked
    watched.sample()
    watched.process.send_signal(signal.SIGTERM)
    figures = {"ready_s": ready, "answer_s": answered, "usage": answer["usage"]}
    journey.keep("serve", watched.finish(), **figures)


def sign(journey: Journey) -> None:
    """Sign the bundle with a key made for it."""
    private, _ = _keys(journey.folder)
    journey.watch("sign", journey.bundle, "--key", private, *journey.passed("threads"))


def package(journey: Journey) -> None:
    """Pack the signed bundle as an image."""
    shutil.rmtree(journey.image, ignore_errors=True)
    journey.watch("package", journey.bundle, "--oci", journey.image)
    journey.verbs["package"]["image_bytes"] = _size(journey.image)


def unpack(journey: Journey) -> None:
    """Unpack the image, verified."""
    shutil.rmtree(journey.unpacked, ignore_errors=True)
    _, public = _keys(journey.folder)
    journey.watch("unpack", journey.image, "--output", journey.unpacked, "--key", public)


def verify(journey: Journey) -> None:
    """Verify the copy that was unpacked."""
    _, public = _keys(journey.folder)
    journey.watch("verify", journey.unpacked, "--key", public)


def validate(journey: Journey) -> None:
    """Validate the copy that was unpacked against the checkpoint, in a process that has built nothing."""
    arguments = [journey.unpacked, "--against", journey.options.checkpoint]
    arguments += journey.passed("positions", "questions", "threads")
    journey.watch("validate", *arguments)


VERBS: dict[str, Callable[[Journey], None]] = {
    "inspect": inspect,
    "build": build,
    "run": run,
    "serve": serve,
    "sign": sign,
    "package": package,
    "unpack": unpack,
    "verify": verify,
    "validate": validate,
}


def _keys(folder: Path) -> tuple[Path, Path]:
    """Return the private and the public key of this journey, made on first use."""
    private, public = folder / "private.pem", folder / "public.pem"
    if not public.is_file():
        made = ("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(private))
        subprocess.run(made, check=True)
        subprocess.run(("openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)), check=True)
    return private, public


def _size(path: Path) -> int:
    """Return the bytes on disk of all files in a folder, as far as they stay while it is read."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += 512 * file.lstat().st_blocks
        except FileNotFoundError:
            continue
    return total


def _line(name: str, figures: dict[str, Any]) -> str:
    peak, child = figures["peak_bytes"] / GIB, figures["peak_child_bytes"] / GIB
    beside = f", a child {child:.2f}" if child else ""
    return (
        f"{name:9} {figures['wall_s']:10,.1f} s wall {figures['processor_s']:10,.1f} s processor; peak {peak:.2f} GiB"
        f"{beside}; exit code {figures['exit_code']}"
    )


def table(document: dict[str, Any]) -> str:
    """Return everything that was measured, for people."""
    verbs = document["verbs"]
    lines = [_line(name, verbs[name]) for name in VERBS if verbs.get(name, {}).get("finished")]
    built = verbs.get("build", {})
    if built.get("finished"):
        lines.append("")
        lines.append(
            f"The build: {len(built['attempts'])} attempts, verdict {built['verdict']}; work directory at most "
            f"{built['work_bytes'] / GIB:.1f} GiB, with the bundle {built['disk_bytes'] / GIB:.1f}; bundle "
            f"{built['bundle_bytes'] / GIB:.2f} GiB. By stage, over all attempts:"
        )
        stages: dict[str, list[float]] = {}
        for attempt in built["attempts"]:
            for stage in attempt["stages"]:
                row = stages.setdefault(stage["name"].partition(", pass ")[0], [0.0, 0.0, 0.0, 0.0])
                row[0] += stage["wall_s"]
                row[1] += stage["processor_s"]
                row[2] = max(row[2], stage["seen_bytes"])
                row[3] += 1
        lines += [
            f"  {name:26} {wall:10,.1f} s wall {processor:10,.1f} s processor; at most {seen / GIB:.2f} GiB"
            f"{f' ({count:.0f} times)' if count > 1 else ''}"
            for name, (wall, processor, seen, count) in stages.items()
        ]
        parts: dict[str, list[float]] = {}
        for block in built["blocks"].values():
            for part, (wall, processor) in block.get("stages", {}).items():
                row = parts.setdefault(part, [0.0, 0.0])
                row[0] += wall
                row[1] += processor
        lines += [
            f"  of quantizing: {part:12} {wall:9,.1f} s wall {processor:10,.1f} s processor"
            for part, (wall, processor) in parts.items()
        ]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="by default that of the checkpoint's folder")
    parser.add_argument("--target", default="host")
    parser.add_argument("--recipe")
    parser.add_argument("--positions", type=int)
    parser.add_argument("--questions", type=int, help="prompts a language that both models answer freely")
    parser.add_argument("--max-memory")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--kill-after", type=int, metavar="BLOCKS")
    parser.add_argument("--only", action="append", default=[], choices=VERBS)
    parser.add_argument("--again", action="append", default=[], choices=VERBS)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/real-size-NAME.json")
    options = parser.parse_args(given)
    # A build that goes on without anyone who counts would be in the way of the next one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.name = options.name or options.checkpoint.name
    journey = Journey(options)
    journey.document["arguments"] = named(sys.argv[1:] if given is None else given)
    journey.go()
    print(f"\n{table(journey.document)}")
    output = options.output or Path(__file__).parent / "results" / f"real-size-{options.name}.json"
    output.write_text(json.dumps(journey.document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
