"""Answers with guessed tokens beside answers without, of one bundle, in turns.

    python -m benchmarks.speculation BUNDLE [--tokens N] [--prompts N] [--threads N] [--output FILE]

Two kinds of prompts from the evaluation text, a language each: a text to go on with, and a text that was there before
and begins again, which an answer that quotes it repeats. ``right`` and ``wrong`` are no way to guess: they guess
what was answered before and what was not, and so show what guessing could bring and what it costs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.loop import read_loop
from glmexport.bundle.manifest import read_manifest
from glmexport.calibration.corpus import shipped_documents
from glmexport.engine.generation import GenerationSession
from glmexport.engine.speculation import Method, Speculation, speculate
from glmexport.foundation import machine
from glmexport.tokenizer.tokenizer import Tokenizer

GUESSED = (1, 4, 8)
ROUNDS = 3


class Scripted:
    """Guesses what it was told, from the end of a prompt of ``length`` tokens on."""

    def __init__(self, length: int, guesses: Sequence[int]) -> None:
        self._known = -length
        self._guesses = list(guesses)

    def follow(self, ids: Sequence[int], hidden: object) -> None:
        """Of tokens, their number alone."""
        self._known += len(ids)

    def propose(self, following: int, count: int) -> list[int]:
        """What stands there in the script."""
        return self._guesses[self._known + 1 :][:count]


def prompts(tokenizer: Tokenizer, count: int, length: int) -> dict[str, list[list[int]]]:
    """Of each kind, one a language."""
    texts: dict[str, str] = {}
    for document in shipped_documents("evaluation"):
        texts.setdefault(document.language, document.text)
    ids = [tokenizer.encode(text) for text in texts.values()]
    ids = [[*tokenizer.prefix, *text[:length]] for text in ids if len(text) >= length][:count]
    return {"going on": ids, "quoting": [[*text, *text[len(tokenizer.prefix) :][:8]] for text in ids]}


Answer = Callable[[list[int], list[int]], tuple[Iterator[int], Speculation | None]]


def ways(bundle: Path, threads: int, tokens: int) -> dict[str, Answer]:
    """By name: how to answer a prompt, given what was answered before."""
    plain = GenerationSession.open(Bundle.open(bundle), threads)

    def scripted(most: int, shift: int) -> Answer:
        def answer(prompt: list[int], known: list[int]) -> tuple[Iterator[int], Speculation | None]:
            speculation = Speculation("lookup", most)
            drafter = Scripted(len(prompt), [token ^ shift for token in known])
            sequence = plain.engine.begin(len(prompt) + tokens)
            chunk = plain.engine.chunk
            return speculate(sequence, drafter, prompt, tokens, speculation, chunk), speculation

        return answer

    def guessing(method: Method, most: int) -> Answer:
        speculation = Speculation(method, most)
        session = GenerationSession.open(Bundle.open(bundle), threads, speculation)
        session.ends = frozenset()

        def answer(prompt: list[int], _: list[int]) -> tuple[Iterator[int], Speculation | None]:
            return session.stream(prompt, tokens), speculation

        return answer

    plain.ends = frozenset()
    found: dict[str, Answer] = {"plain": lambda prompt, _: (plain.stream(prompt, tokens), None)}
    config = read_loop(bundle)
    for most in GUESSED:
        found[f"right {most}"], found[f"wrong {most}"] = scripted(most, 0), scripted(most, 1)
        found[f"lookup {most}"] = guessing("lookup", most)
        if config and config.draft:
            found[f"mtp {most}"] = guessing("mtp", most)
    return found


def measured(answers: dict[str, Answer], asked: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """Tokens per second behind the first, acceptance, and how many answers are those without guesses."""
    known: list[list[int]] = []
    rates: dict[str, list[float]] = {name: [] for name in answers}
    same = dict.fromkeys(answers, 0)
    counted: dict[str, Speculation] = {}
    for turn in range(ROUNDS):
        # Each way takes its turn at each prompt, so that what else the machine does falls on all alike.
        for at, prompt in enumerate(asked):
            for name, answer in answers.items():
                stream, speculation = answer(prompt, known[at] if len(known) > at else [])
                given = [next(stream)]
                started = time.perf_counter()
                given += stream
                rates[name].append((len(given) - 1) / (time.perf_counter() - started))
                if speculation:
                    counted.setdefault(f"{name}.{turn}.{at}", speculation)
                if name == "plain" and len(known) == at:
                    known.append(given)
                same[name] += given == known[at]
    rows = {}
    for name in answers:
        mine = {id(s): s.tally for key, s in counted.items() if key.startswith(f"{name}.")}.values()
        drafted, accepted = (sum(getattr(tally, field) for tally in mine) for field in ("drafted", "accepted"))
        ratio = median(rate / base for rate, base in zip(rates[name], rates["plain"], strict=True))
        rows[name] = {
            "tokens_per_s": round(median(rates[name]), 1),
            "ratio": round(ratio, 3),
            "drafted": drafted,
            "accepted": accepted,
            "same_answers": same[name],
            "answers": ROUNDS * len(asked),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(options.bundle)
    answers = ways(options.bundle, options.threads, options.tokens)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.speculation",
        "bundle": f"{manifest.source.title}, {manifest.recipe.name}, {manifest.target.name}",
        "weight_bytes": manifest.precision.weight_bytes,
        "processor": machine.processor_name(),
        "threads": options.threads,
        "versions": machine.library_versions(),
        "kinds": {},
    }
    for kind, asked in prompts(Tokenizer.open(options.bundle), options.prompts, options.length).items():
        rows = document["kinds"][kind] = measured(answers, asked)
        print(f"{kind}: {len(asked)} prompts, {options.tokens} tokens each")
        for name, row in rows.items():
            share = f"{row['accepted'] / row['drafted']:6.1%} accepted" if row["drafted"] else " " * 15
            same = f"{row['same_answers']} of {row['answers']} answers as plain"
            print(f"  {name:10} {row['tokens_per_s']:9.1f} tokens/s {row['ratio']:6.2f}x {share}  {same}")
    if options.output:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
