"""``glmexport serve`` under load: tokens per second and waiting times by how many ask at once, and a soak.

    python -m benchmarks.serve BUNDLE [--concurrency N]... [--seconds S] [--soak-s S] [--batch] [--output FILE]

Clients in this process ask for streamed greedy answers to texts of the evaluation corpus, given as token ids, each the
next as soon as it has one. Every answer is compared with the one that the same prompt got alone: one that differs is
another's (crossed), one without its end is lost. With --batch, one can differ by rounding, too. Percentiles are bounds
that hold with 99 % confidence; p90 needs 64 samples and p99 662, and is null below. Times between tokens are not
independent within an answer, so that theirs are too narrow. The soak mixes clients that wait with clients that leave,
and says how the server's memory grew (PSS).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from glmexport.bundle.manifest import read_manifest
from glmexport.calibration.corpus import shipped_documents
from glmexport.foundation import machine
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.bootstrap import percentile

CONCURRENCY = (1, 2, 4, 8, 16, 32)
#: Of the soak: every so many answers, a client leaves in the middle of one.
_LEAVES = 5
_SAMPLES_S = 1.0


@dataclass(frozen=True)
class Server:
    """A server process that is ready."""

    process: psutil.Process
    host: str
    port: int


@contextmanager
def served(bundle: Path, arguments: Sequence[object]) -> Iterator[Server]:
    """``glmexport serve`` on a free port."""
    command = [sys.executable, "-m", "glmexport", "serve", bundle, "--port", 0, "--json", *arguments]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            host, _, port = said["url"].removeprefix("http://").rpartition(":")
            yield Server(psutil.Process(process.pid), host, int(port))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    if status:
        raise RuntimeError(f"The server ended with {status}.")


@dataclass
class Tally:
    """What became of the answers of one level."""

    answers: int = 0
    tokens: int = 0
    crossed: int = 0
    lost: int = 0
    left: int = 0
    refused: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def row(self, seconds: float) -> dict[str, Any]:
        """Its figures."""
        counts = {name: getattr(self, name) for name in ("answers", "tokens", "crossed", "lost", "left", "refused")}
        times = {f"{name}_s": _times(getattr(self, f"{name}_s")) for name in ("ttft", "gaps")}
        return {"seconds": round(seconds, 2), **counts, "tokens_per_s": round(self.tokens / seconds, 2), **times}


def _times(sample: Sequence[float]) -> dict[str, Any]:
    p90, p99 = percentile(sample, 0.90), percentile(sample, 0.99)
    return {"n": len(sample), "p50": median(sample) if sample else None, "p90": p90, "p99": p99}


async def ask(server: Server, prompt: Sequence[int], tokens: int, tally: Tally, leave_after: int = 0) -> list[int]:
    """The token ids of a streamed answer; the client goes after so many, if it leaves."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "return_token_ids": True}
    ).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    try:
        asked = last = time.perf_counter()
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        ids: list[int] = []
        ended = False
        async for line in reader:
            if line.startswith(b"HTTP/1.1 429"):
                tally.refused += 1
                return ids
            ended |= line.startswith(b"data: [DONE]")
            if not line.startswith(b"data: {"):
                continue
            new = json.loads(line[6:])["choices"][0]["token_ids"]
            now = time.perf_counter()
            if new:
                (tally.gaps_s if ids else tally.ttft_s).append(now - (last if ids else asked))
                last = now
            ids += new
            if leave_after and len(ids) >= leave_after:
                tally.left += 1
                return ids
        tally.lost += not ended
        tally.answers += ended
        tally.tokens += len(ids)
        return ids
    finally:
        writer.close()


async def load(
    server: Server, prompts: Sequence[list[int]], known: Sequence[list[int]], options: argparse.Namespace,
    clients: int, seconds: float, *, leaving: bool = False,
) -> Tally:  # fmt: skip
    """So many clients at once for so long."""
    tally, until = Tally(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        turn = number
        while time.perf_counter() < until:
            at = turn % len(prompts)
            leave = 1 + turn % 3 if leaving and turn % _LEAVES == 0 else 0
            ids = await ask(server, prompts[at], options.tokens, tally, leave)
            tally.crossed += bool(ids) and ids != known[at][: len(ids)]
            turn += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally


async def soaked(
    server: Server, prompts: Sequence[list[int]], known: Sequence[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """A long time of clients that wait and clients that leave, and the server's memory meanwhile."""
    started = time.perf_counter()
    running = asyncio.create_task(load(server, prompts, known, options, 8, options.soak_s, leaving=True))
    at_s, pss = [], []
    while not running.done():
        at_s.append(time.perf_counter() - started)
        pss.append(server.process.memory_full_info().pss)
        await asyncio.sleep(max(_SAMPLES_S, options.soak_s / 1000))
    tally = await running
    # What is allocated once, on first use, is no growth.
    half = len(at_s) // 2
    slope = float(np.polyfit(at_s[half:], pss[half:], 1)[0]) if len(at_s) - half > 2 else None
    memory = {"pss_first": pss[0], "pss_last": pss[-1], "pss_highest": max(pss), "pss_slope_bytes_per_s": slope}
    return tally.row(time.perf_counter() - started) | memory | {"clients": 8}


async def measured(server: Server, prompts: Sequence[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Every level, and the soak."""
    known = [await ask(server, prompt, options.tokens, Tally()) for prompt in prompts]
    rows = []
    for clients in options.concurrency or CONCURRENCY:
        started = time.perf_counter()
        tally = await load(server, prompts, known, options, clients, options.seconds)
        rows.append({"concurrency": clients, **tally.row(time.perf_counter() - started)})
        print(_line(rows[-1]), flush=True)
    soak = await soaked(server, prompts, known, options) if options.soak_s else None
    if soak:
        print(json.dumps(soak))
    return {"rows": rows, "soak": soak}


def _line(row: dict[str, Any]) -> str:
    def told(times: dict[str, Any]) -> str:
        shown = (f"{name} " + (f"{times[name] * 1e3:.0f}" if times[name] is not None else "-") for name in _NAMES)
        return " ".join(shown)

    return (
        f"{row['concurrency']:3} at once: {row['tokens_per_s']:8.1f} tokens/s, {row['answers']} answers, "
        f"first token {told(row['ttft_s'])} ms, between tokens {told(row['gaps_s'])} ms, "
        f"{row['crossed']} crossed, {row['lost']} lost, {row['refused']} refused"
    )


_NAMES = ("p50", "p90", "p99")


def evaluation_prompts(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Token ids of the beginnings of texts, in as many languages as there are."""
    ids = (tokenizer.encode(document.text) for document in shipped_documents("evaluation"))
    return [[*tokenizer.prefix, *text[:length]] for text in ids if len(text) >= length][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", type=int, action="append", metavar="N", help="clients at once; repeatable")
    parser.add_argument("--seconds", type=float, default=60, help="of each level")
    parser.add_argument("--soak-s", type=float, default=0, help="of the soak; 0 for none")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--parallel", type=int, default=4, help="answers that the server lets take turns")
    parser.add_argument("--batch", action="store_true", help="compute the next tokens of all in one step")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of the server")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    manifest = read_manifest(options.bundle)
    prompts = evaluation_prompts(Tokenizer.open(options.bundle), options.prompts, options.length)
    arguments = ("--threads", options.threads, "--parallel", options.parallel, *(["--batch"] if options.batch else []))
    with served(options.bundle, arguments) as server:
        found = asyncio.run(measured(server, prompts, options))
    document = {
        "command": "python -m benchmarks.serve",
        "date": datetime.now(UTC).date().isoformat(),
        "bundle": f"{manifest.source.title}, {manifest.recipe.name}, {manifest.target.name}",
        "weight_bytes": manifest.precision.weight_bytes,
        "processor": machine.processor_name(),
        "threads": options.threads,
        "parallel": options.parallel,
        "batch": options.batch,
        "prompt_tokens": options.length,
        "answer_tokens": options.tokens,
        "versions": machine.library_versions(),
        **found,
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
