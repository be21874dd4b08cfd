"""Answer a job, or the rest of it.

    python3 program.pyz JOB RESULTS [--emulated REASON] [--attended]
    python3 program.pyz JOB --missing    only names the job's files that are not there, or are others
    python3 program.pyz          in a kit: the job beside it, and results.zip when it is done

Every answer is flushed and renamed into its place: the same command continues a run that ended at any moment, and
ends with the same bytes. Progress is one JSON document a line on the standard output, of which the last is ``done`` or
``error``. An attended run ends as soon as its standard input does: nobody would take its answers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from glmexport.wire.device.facts import cores, device_facts
from glmexport.wire.standalone import Failure, Tell, looked_at, read_tensors, replace, sha256, verify, write_tensors

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
#: Number of half seconds to wait for a run that has lost its listener and is about to end.
_PATIENCE = 60


def answer(folder: Path, results: Path, emulated: str | None, tell: Tell) -> None:
    """Do everything of the job in ``folder`` that is still to do."""
    # A missing library is found here, where an event can report it.
    from glmexport.wire.device.answers import answer_text, answer_tokens, measure_speed, placed_nodes
    from glmexport.wire.device.graphs import JobGraphs

    job, digest = _read(folder)
    verify(job, folder, tell)
    threads = job["threads"] or cores()
    graphs = JobGraphs(job, folder, threads)
    result = _begun(results, digest)

    def save() -> None:
        replace(results / "result.json", [(json.dumps(result, indent=1) + "\n").encode()])

    if "speed" not in result:
        absent = emulated or (None if job["speed"] else "Speed was not asked for.")
        result["speed"] = None if absent else measure_speed(graphs, job["speed"], threads, tell)
        result["speed_absent_because"] = absent
        result["nodes"] = None if absent else placed_nodes(graphs, job["speed"]["prompt"], results)
    questions = read_tensors(folder / "questions.safetensors")
    # One graph is in memory at a time.
    engine = graphs.engine() if job["prompts"] else None
    scorer = None if engine else graphs.scorer()
    result["device"] = device_facts(graphs.provider, emulated)
    save()
    for index, most in enumerate(job["prompts"]):
        path = results / "tokens" / f"{index}.safetensors"
        if engine and not path.exists():
            tokens = answer_tokens(engine, questions[f"prompt.{index}.ids"].tolist(), most)
            write_tensors(path, {"tokens": tokens})
        tell({"event": "prompt", "index": index + 1, "of": len(job["prompts"])})
    del engine
    scorer = scorer or graphs.scorer()
    for index, prefix in enumerate(job["texts"]):
        path = results / "answers" / f"{index}.safetensors"
        if not path.exists():
            write_tensors(path, answer_text(scorer, questions, index, prefix))
        tell({"event": "text", "index": index + 1, "of": len(job["texts"])})
    result["files"] = [
        {"path": path.relative_to(results).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}
        for path in _answers(results)
    ]
    result["complete"] = True
    save()


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    content = (folder / "job.json").read_bytes()
    job = json.loads(content)
    if (job.get("format"), job.get("version")) != ("glmexport-job", 1):
        raise Failure("files", f"{folder / 'job.json'} is no job that this program knows.", "Bring both again.")
    return job, hashlib.sha256(content).hexdigest()


def _answers(results: Path) -> list[Path]:
    return sorted(results.glob("*/*.safetensors"))


def _begun(results: Path, digest: str) -> dict[str, Any]:
    """Return the result so far of this very job; that of another one is removed."""
    path = results / "result.json"
    with contextlib.suppress(OSError, ValueError):
        former = json.loads(path.read_text("utf-8"))
        if former.get("job_digest") == digest:
            # Answers of a finished run that have changed since are computed again.
            for entry in former["files"]:
                if sha256(results / entry["path"]) != entry["sha256"]:
                    (results / entry["path"]).unlink()
            return {**former, "complete": False}
    for old in [path, *_answers(results), *results.glob("profile*.json")]:
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
    return {"format": "glmexport-result", "version": 1, "job_digest": digest, "files": [], "complete": False}


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[None]:
    """Hold a lock, so that no two runs at a time write into one folder."""
    results.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (results / ".lock").open("w") as file:
        for left in range(_PATIENCE, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise Failure("busy", f"Another run is at work in {results}.", "Wait for it.") from None
                time.sleep(0.5)
        yield


def _failure(error: Exception, results: Path) -> Failure:
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return Failure(
            "disk", f"There is no space left for the results in {results}.", "Free space, then run it again."
        )
    if isinstance(error, ImportError):
        return Failure(
            "environment",
            f"Python {platform.python_version()} ({sys.executable}) has no {error.name or 'library'}: {error}.",
            "Install numpy and onnxruntime there, or name the Python that has them.",
        )
    if isinstance(error, MemoryError):
        return Failure("memory", "There is not enough memory.", "Free some, then run it again.")
    first = next(iter(str(error).splitlines()), "")
    return Failure("runtime", f"{type(error).__name__}: {first}", "Run it again; if it stays so, report this line.")


def _end_with_input() -> None:
    # This is not sys.stdin, whose lock a thread may not hold when Python ends.
    while os.read(0, 1 << 12):
        pass
    # A file that is being written has another name until it is whole.
    os._exit(3)


def main(arguments: list[str]) -> int:
    """Answer the job, and return 0, or 1 after an ``error``."""
    # Output that libraries print must not come between the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    emulated, here = None, Path(sys.argv[0]).resolve().parent
    if "--emulated" in arguments:
        at = arguments.index("--emulated")
        emulated = arguments[at + 1]
        del arguments[at : at + 2]
    if "--attended" in arguments:
        arguments.remove("--attended")
        threading.Thread(target=_end_with_input, daemon=True).start()
    kit = not arguments
    missing = "--missing" in arguments
    if missing:
        arguments.remove("--missing")
    folder, results = (here / "job", here / "results") if kit else map(Path, (*arguments, ".")[:2])

    def tell(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        if missing:
            for name, there in looked_at(_read(folder)[0], folder):
                tell({"event": "there" if there else "missing", "path": name})
            tell({"event": "done"})
            return 0
        with _alone(results):
            answer(folder, results, emulated, tell)
            if kit:
                with zipfile.ZipFile(here / "results.zip", "w") as archive:
                    for path in [results / "result.json", *_answers(results)]:
                        archive.write(path, path.relative_to(results).as_posix())
                tell({"event": "packed", "path": str(here / "results.zip")})
    except Exception as error:
        # Every error is reported to the machine that asked: it sees only the events of this one.
        tell(_failure(error, results).event)
        return 1
    tell({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
