"""Faults planted in a finished bundle, and which plane of the validation catches which.

    python -m benchmarks.faults bundles/demo-w4g32-x86-avx2 --against demo

Each fault is made in a copy whose manifest is written anew, as if the export itself had made it: the digests of the
files, which would give away any change made later, are those of the faulty files. The table is printed in Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import MANIFEST, list_files, read_manifest
from glmexport.bundle.names import SCORING
from glmexport.calibration.corpus import shipped_documents
from glmexport.cli.console import Terminal
from glmexport.report.document import Report
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.conditions import ValidationPlan
from glmexport.workflows.original import Original
from glmexport.workflows.validate import BuildOptions, validate_bundle

LANGUAGE = "zh"


class Stored:
    """The initializers of a bundle's graphs, to be changed in place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.initializers = ir.load(directory / SCORING).graph.initializers

    def edit(self, name: str) -> NDArray[np.generic]:
        """The stored array; what is written to it is in the file."""
        tensor = self.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor), f"{name} is not external"
        shape = tuple(tensor.shape.numpy())
        path = self.directory / str(tensor.location)
        return np.memmap(path, tensor.dtype.numpy(), "r+", tensor.offset or 0, shape)

    def named(self, end: str, part: str = "") -> list[str]:
        """Names that end so and have ``part`` in them."""
        return [name for name in self.initializers if name.endswith(end) and part in name]


def scales_of_one_layer(directory: Path) -> None:
    """Every scale of decoder layer 1 times 1.01."""
    stored = Stored(directory)
    for name in stored.named(".scales", "layers.1."):
        scales = stored.edit(name)
        scales[:] = (scales.astype(np.float32) * 1.01).astype(scales.dtype)


def swapped_template(directory: Path) -> None:
    """The assistant's turn opened as the user's."""
    path = directory / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert "<|assistant|>" in text
    path.write_text(text.replace("<|assistant|>", "<|user|>"), encoding="utf-8")


def embeddings_of_one_language(directory: Path) -> None:
    """Codes of the embeddings of tokens that only Chinese text has, backwards."""
    tokenizer, chinese, others = Tokenizer.open(directory), set[int](), set[int]()
    for document in shipped_documents("evaluation"):
        (chinese if document.language == LANGUAGE else others).update(tokenizer.encode(document.text))
    rows = sorted(chinese - others) or sorted(chinese)[:8]
    codes = Stored(directory).edit(Stored(directory).named("embed_tokens.weight.codes")[0])
    codes[rows] = codes[rows][:, ::-1]


def rope_base(directory: Path) -> None:
    """Rotary tables of base 15,000 in place of 10,000."""
    stored = Stored(directory)
    cos, sin = stored.edit("cos_cache"), stored.edit("sin_cache")
    positions, pairs = cos.shape
    angles = np.outer(np.arange(positions), 15000.0 ** (-np.arange(pairs) / pairs))
    cos[:], sin[:] = np.cos(angles), np.sin(angles)


def lm_head_row(directory: Path) -> None:
    """The row of the lm_head that predicts the most frequent token of Chinese text becomes zero."""
    tokenizer = Tokenizer.open(directory)
    ids = [i for d in shipped_documents("evaluation") if d.language == LANGUAGE for i in tokenizer.encode(d.text)]
    row = int(np.bincount(ids).argmax())
    Stored(directory).edit("lm_head.weight.scales")[row] = 0


def zero_points(directory: Path) -> None:
    """Every zero point of one matrix one less."""
    stored = Stored(directory)
    (name,) = stored.named("o_proj.weight.zero_points", "layers.1.")
    packed = stored.edit(name)
    low, high = packed & 15, packed >> 4
    packed[:] = (np.maximum(high, 1) - 1 << 4) | (np.maximum(low, 1) - 1)


FAULTS: dict[str, Callable[[Path], None]] = {
    "scales of one layer ×1.01": scales_of_one_layer,
    "chat template swapped": swapped_template,
    "embeddings of one language damaged": embeddings_of_one_language,
    "RoPE base 15,000 for 10,000": rope_base,
    "one row of the lm_head zero": lm_head_row,
    "zero points of one matrix off by one": zero_points,
}


def plant(bundle: Path, copy: Path, fault: Callable[[Path], None]) -> Path:
    """A copy of ``bundle`` with the fault in it and a manifest that lists the faulty files."""
    shutil.copytree(bundle, copy)
    fault(copy)
    manifest = read_manifest(copy)
    again = manifest.model_copy(update={"files": list_files(copy)})
    assert again.files != manifest.files, f"{fault.__name__} changed nothing"
    (copy / MANIFEST).write_text(again.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return copy


def row(name: str, report: Report) -> str:
    """What each plane says: its gravest gate."""
    planes = {
        "weights": ("Tensors that", "Matrices with"),
        "prompts": ("Prompts",),
        "fidelity": ("Mean KL", "ln perplexity", "Top-1"),
        "behaviour": ("ln of lengths", "Answers", "More answers", "Tool calls", "chrF"),
    }
    cells = [name]
    for starts in planes.values():
        gates = [gate for gate in report.gates if gate.name.startswith(starts)]
        gravest = max(gates, key=lambda gate: gate.verdict.severity)
        cells.append("–" if gravest.verdict is Verdict.PASS else f"**{gravest.verdict}**: {_told(gravest)}")
    cells.append(f"**{report.verdict}**")
    return f"| {' | '.join(cells)} |"


def _told(gate: Gate) -> str:
    where = f" in {gate.language}" if gate.language else ""
    first = gate.sample.partition("; first ")[2]
    return f"{gate.name.lower()} {gate.value:.3g}{where}{f' ({first})' if first else ''}"


def main() -> None:
    """Plant every fault, validate, print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", help="part of a fault's name")
    arguments = parser.parse_args()
    terminal = Terminal()
    original = Original.open(arguments.against, terminal)
    out = sys.stdout
    out.write("| fault | weights | prompts | fidelity | behaviour | verdict |\n|---|---|---|---|---|---|\n")
    options = BuildOptions(arguments.threads, validation=ValidationPlan(full_text=True, share_texts=0, speed_seconds=0))
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as work:
        for index, (name, fault) in enumerate(FAULTS.items()):
            if not arguments.only or any(part in name for part in arguments.only):
                copy = plant(arguments.bundle, Path(work) / str(index), fault)
                report = validate_bundle(Bundle.open(copy), original, options, terminal).report
                out.write(row(name, report) + "\n")
                out.flush()
                shutil.rmtree(copy)


if __name__ == "__main__":
    main()
