"""Split the demo texts into train, calibration and evaluation, and write the held-out extracts.

Run from the repository root: `python -m benchmarks.demo_checkpoint.split --text DIR`, where DIR holds
`python-docs/en-XX.jsonl.gz` (sentence pairs in document order) and `udhr/*.txt`.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

Held = Literal["calibration", "evaluation"]
Pair = tuple[str, str]

HELD: tuple[Held, Held] = ("evaluation", "calibration")
CJK = frozenset({"zh", "ja", "ko"})
# tr and id first: they are small, so their share must be chosen before larger files take keys from them.
DOCS_FILES = {
    "tr": "tr", "id": "id", "zh": "zh-cn", "fr": "fr", "ja": "ja", "uk": "uk", "ko": "ko", "es": "es",
}  # fmt: skip
UDHR_FILES = {
    "zh": "cmn_hans", "en": "eng", "ja": "jpn", "ko": "kor", "fr": "fra", "es": "spa", "uk": "ukr",
    "tr": "tur", "id": "ind", "ar": "arb", "hi": "hin", "bn": "ben", "ru": "rus", "vi": "vie", "th": "tha",
    "sw": "swh", "yo": "yor", "am": "amh", "ka": "kat", "km": "khm", "zu": "zul",
}  # fmt: skip
BUDGET: dict[Held, int] = {"evaluation": 24_000, "calibration": 50_000}  # UTF-8 bytes per language
ID_BUDGET: dict[Held, int] = {"evaluation": 20_000, "calibration": 30_000}
MIN_SENTENCE = 20  # characters; shorter lines recur in every chapter, so they are never held out
MIN_TRAIN_SHARE = 0.7
ARTICLES = 30
UDHR_SHARE: dict[Held, int] = {"evaluation": 9, "calibration": 8}  # articles
UDHR_DOCUMENTS = 5
DOCS_LICENCE = "PSF-2.0 AND CC0-1.0"
UDHR_LICENCE = "LicenseRef-public-domain"


@dataclass(frozen=True)
class Document:
    """One held-out document: an id such as `python-docs/zh/0007` and its text."""

    id: str
    text: str


@dataclass
class Split:
    """The three splits: held-out documents by (language, split); training text and pairs by language."""

    held: dict[tuple[str, Held], list[Document]] = field(default_factory=dict)
    text: dict[str, list[str]] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    declaration: dict[str, list[str]] = field(default_factory=dict)


def normalise(sentence: str) -> str:
    """Fold case and whitespace, so that trivially different copies of a sentence compare equal."""
    return " ".join(sentence.casefold().split())


def read_pairs(path: Path, key: str) -> list[Pair]:
    """Read one (English, translation) file in document order, each distinct pair once."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return list(dict.fromkeys((row["en"].strip(), row[key].strip()) for row in rows))


def document_size(language: str) -> int:
    """Return the target length of a document in characters."""
    return 950 if language in CJK else 2000


def chunks(lines: Iterable[str], size: int) -> Iterator[str]:
    """Join consecutive lines into texts of about `size` characters."""
    part: list[str] = []
    length = 0
    for line in lines:
        if part and length + len(line) > size * 1.25:
            yield "\n".join(part)
            part, length = [], 0
        part.append(line)
        length += len(line) + 1
    if length >= size // 3:
        yield "\n".join(part)


def blocks(pairs: list[Pair], size: int) -> list[list[Pair]]:
    """Cut a file into runs of consecutive pairs whose translations have about `size` characters."""
    result: list[list[Pair]] = [[]]
    length = 0
    for pair in pairs:
        if length >= size:
            result.append([])
            length = 0
        result[-1].append(pair)
        length += len(pair[1]) + 1
    return result


def eligible(english: str) -> bool:
    """Say whether a sentence is long enough to be held out."""
    return len(english) >= MIN_SENTENCE


def held_bytes(pairs: list[Pair], assigned: dict[str, Held], held: Held) -> int:
    """Count the UTF-8 bytes of the translations whose English sentence is assigned to `held`."""
    return sum(len(xx.encode()) for en, xx in pairs if assigned.get(normalise(en)) == held)


def assign(files: dict[str, list[Pair]], rng: random.Random) -> dict[str, Held]:
    """Choose the held-out English sentences, as blocks of consecutive sentences: normalised text -> split."""
    assigned: dict[str, Held] = {}
    for language, pairs in files.items():
        candidates = blocks(pairs, document_size(language))
        rng.shuffle(candidates)
        for held in HELD:
            budget = (ID_BUDGET if language == "id" else BUDGET)[held]
            missing = budget * 1.1 - held_bytes(pairs, assigned, held)
            if language == "zh":  # otherwise every language would get only the chapters of tr and id
                missing = max(missing, 0.6 * budget)
            while missing > 0 and candidates:
                block = [p for p in candidates.pop() if eligible(p[0]) and normalise(p[0]) not in assigned]
                assigned.update({normalise(en): held for en, _ in block})
                missing -= sum(len(xx.encode()) for _, xx in block)
    return assigned


def forbidden_strings(files: dict[str, list[Pair]], assigned: dict[str, Held]) -> dict[Held, set[str]]:
    """Collect, per held-out split, every normalised sentence and translation that belongs to it."""
    strings: dict[Held, set[str]] = {"evaluation": set(), "calibration": set()}
    for pairs in files.values():
        for pair in pairs:
            held = assigned.get(normalise(pair[0]))
            if held is not None:
                strings[held].update(map(normalise, pair))
    return strings


def keep_pair(pair: Pair, held: Held | None, owner: Held | None, strings: dict[Held, set[str]]) -> bool:
    """Say whether a pair owned by split `owner` may appear in `held`: evaluation wins, then calibration."""
    if owner != held:
        return False
    order: dict[Held | None, tuple[Held, ...]] = {"evaluation": (), "calibration": HELD[:1], None: HELD}
    return not any(normalise(side) in strings[other] for other in order[held] for side in pair)


def select(lines: list[str], language: str, budget: int, rng: random.Random) -> list[str]:
    """Build documents from held-out lines and pick a random selection of `budget` UTF-8 bytes, in order."""
    texts = list(chunks(dict.fromkeys(lines), document_size(language)))
    order = list(range(len(texts)))
    rng.shuffle(order)
    chosen: list[int] = []
    for index in order:
        if budget <= 0:
            break
        chosen.append(index)
        budget -= len(texts[index].encode())
    return [texts[index] for index in sorted(chosen)]


def add_docs(split: Split, files: dict[str, list[Pair]], rng: random.Random) -> None:
    """Add the Python documentation to the split; English is the union of the English sides, each once."""
    assigned = assign(files, rng)
    strings = forbidden_strings(files, assigned)
    english: dict[Held | None, dict[str, None]] = {None: {}, "evaluation": {}, "calibration": {}}
    for language in ("zh", *(code for code in files if code != "zh")):
        owners = [(pair, assigned.get(normalise(pair[0]))) for pair in files[language]]
        train = [pair for pair, owner in owners if keep_pair(pair, None, owner, strings)]
        split.pairs[language] = train
        split.text[language] = list(chunks(dict.fromkeys(xx for _, xx in train), document_size(language)))
        english[None].update(dict.fromkeys(en for en, _ in train))
        for held in HELD:
            kept = [pair for pair, owner in owners if keep_pair(pair, held, owner, strings)]
            texts = select([xx for _, xx in kept], language, BUDGET[held], rng)
            split.held[language, held] = number("python-docs", language, held, texts)
            english[held].update(dict.fromkeys(en for en, _ in kept))
        size = sum(len(xx) for _, xx in files[language])
        assert sum(len(xx) for _, xx in train) >= MIN_TRAIN_SHARE * size, language
    split.text["en"] = list(chunks(english[None], document_size("en")))
    for held in HELD:
        texts = select(list(english[held]), "en", BUDGET[held], rng)
        split.held["en", held] = number("python-docs", "en", held, texts)


def number(source: str, language: str, held: Held, texts: list[str]) -> list[Document]:
    """Give every text an id; evaluation counts from 0 and calibration from 5000, so ids never collide."""
    start = 0 if held == "evaluation" else 5000
    return [Document(f"{source}/{language}/{start + i:04d}", text) for i, text in enumerate(texts)]


def read_declaration(path: Path) -> tuple[str, list[str]]:
    """Read one translation of the declaration: the preamble and its 30 articles, lines stripped."""
    sections = re.split(r"(?m)^ {2,3}$", path.read_text(encoding="utf-8"))
    clean = ["\n".join(line.strip() for line in part.splitlines() if line.strip()) for part in sections]
    clean = [part for part in clean if part]
    if "www." in clean[-1]:  # one translation ends with the address of its typist
        clean.pop()
    if len(clean) <= ARTICLES:
        raise ValueError(f"{path.name}: {len(clean)} sections, expected a preamble and {ARTICLES} articles")
    return "\n".join(clean[:-ARTICLES]), clean[-ARTICLES:]


def add_declaration(split: Split, directory: Path, rng: random.Random) -> None:
    """Add the declaration, split by article number: the same articles are held out in every language."""
    order = list(range(ARTICLES))
    rng.shuffle(order)
    numbers: dict[Held, list[int]] = {}
    for held in HELD:
        numbers[held] = sorted(order[: UDHR_SHARE[held]])
        del order[: UDHR_SHARE[held]]
    language_of = {name: language for language, name in UDHR_FILES.items()}
    for path in sorted(directory.glob("*.txt")):
        preamble, articles = read_declaration(path)
        train = [preamble, *(articles[index] for index in sorted(order))]
        language = language_of.get(path.stem)
        split.declaration[language or path.stem] = train
        if language is None:
            continue
        for held in HELD:
            texts = [articles[index] for index in numbers[held]]
            step = len(texts) / UDHR_DOCUMENTS
            cuts = [round(step * i) for i in range(UDHR_DOCUMENTS + 1)]
            merged = ["\n".join(texts[a:b]) for a, b in pairwise(cuts)]
            split.held.setdefault((language, held), []).extend(number("udhr", language, held, merged))


def lines_of(texts: Iterable[str]) -> set[str]:
    """Return the distinct normalised sentences of some texts."""
    return {normalise(line) for text in texts for line in text.split("\n")} - {""}


def assert_disjoint(split: Split) -> int:
    """Fail if a held-out sentence occurs in another split; return the number of held-out sentences."""
    lines: dict[Held, set[str]] = {"evaluation": set(), "calibration": set()}
    for (_, held), documents in split.held.items():
        lines[held] |= lines_of(document.text for document in documents)
    train: set[str] = set()
    for texts in (*split.text.values(), *split.declaration.values()):
        train |= lines_of(texts)
    train |= lines_of(side for pairs in split.pairs.values() for pair in pairs for side in pair)
    for first, second in ((lines["evaluation"], lines["calibration"]), *((lines[h], train) for h in HELD)):
        overlap = first & second
        if overlap:
            raise AssertionError(f"{len(overlap)} held-out sentences leak, such as {sorted(overlap)[:3]}")
    return sum(map(len, lines.values()))


def make_split(text: Path, seed: int = 20260) -> Split:
    """Read the texts below `text` and split them; the same input gives the same split."""
    rng = random.Random(seed)
    files = {
        language: read_pairs(text / "python-docs" / f"en-{key}.jsonl.gz", key) for language, key in DOCS_FILES.items()
    }
    split = Split()
    add_docs(split, files, rng)
    add_declaration(split, text / "udhr", rng)
    assert_disjoint(split)
    return split


def licence_of(documents: list[Document]) -> tuple[str, str]:
    """Return the SPDX licence expression and the source of a corpus file."""
    docs = any(d.id.startswith("python-docs/") for d in documents)
    parts = [("Python documentation and its translations", DOCS_LICENCE)] if docs else []
    parts.append(("Universal Declaration of Human Rights, by article", UDHR_LICENCE))
    return " AND ".join(licence for _, licence in parts), "; ".join(source for source, _ in parts)


def write_corpora(split: Split, out: Path) -> None:
    """Write one JSON Lines file per language and split, and `corpora.toml` that describes them."""
    out.mkdir(parents=True, exist_ok=True)
    tables: list[str] = []
    for (language, held), documents in sorted(split.held.items()):
        rows = [json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) for d in documents]
        data = ("\n".join(rows) + "\n").encode()
        name = f"{language}.{held}.jsonl"
        (out / name).write_bytes(data)
        licence, source = licence_of(documents)
        values = {"language": language, "split": held, "file": name, "licence": licence, "source": source}
        counts = {"documents": len(documents), "characters": sum(len(d.text) for d in documents)}
        body = [f'{key} = "{value}"' for key, value in values.items()]
        body += [f"{key} = {value}" for key, value in counts.items()]
        tables.append("\n".join(["[[corpus]]", *body, f'sha256 = "{hashlib.sha256(data).hexdigest()}"']))
    (out / "corpora.toml").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def main() -> None:
    """Write the held-out extracts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with python-docs/ and udhr/")
    parser.add_argument("--out", type=Path, default=Path("calibration/corpora"))
    arguments = parser.parse_args()
    split = make_split(arguments.text)
    write_corpora(split, arguments.out)
    for (language, held), documents in sorted(split.held.items()):
        size = sum(len(document.text.encode()) for document in documents)
        print(f"{language} {held}: {len(documents)} documents, {size} bytes")
    for language, pairs in split.pairs.items():
        print(f"{language} train: {len(pairs)} pairs, {sum(len(xx.encode()) for _, xx in pairs)} bytes")
    print(f"{assert_disjoint(split)} held-out sentences, none of them in another split")


if __name__ == "__main__":
    main()
