"""One checkpoint in every runtime's own format, made on first use and kept in the work folder."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from benchmarks.peers.environments import create, interpreter
from benchmarks.runtimes import Runnable, RuntimeFailed, run
from glmexport.bundle.genai_config import PREFILL_TOKENS

_SCRIPTS = Path(__file__).parent
#: Of the releases with every processor's kernels in one package: llama.cpp's libraries as node-llama-cpp ships them.
LLAMA_CPP_PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
_UNREAD = ("embed", "cos_cache", "sin_cache")


@dataclass(frozen=True)
class Preparation:
    """Where everything is."""

    checkpoint: Path
    work: Path
    target: str

    @property
    def config(self) -> dict[str, int]:
        config: dict[str, int] = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        return config

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of the blocks."""
        config = self.config
        hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        heads = config["num_attention_heads"] * size
        attention = hidden * (2 * heads + 2 * config["num_key_value_heads"] * size)
        return config["num_hidden_layers"] * (attention + 3 * hidden * inner)

    def python(self, environment: str) -> str:
        """The interpreter of an environment of a peer's."""
        create(self.work / "environments", environment)
        return str(interpreter(self.work / "environments", environment).absolute())

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """What ``make`` writes under a path that it is given, complete or not at all."""
        done = self.work / name
        if not done.exists():
            partial = done.with_name(f"partial-{done.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            make(partial)
            partial.rename(done)
        return done


def glmexport(at: Preparation, form: str) -> Runnable:
    """The graph and the configuration of our bundles, FORMAT or FORMAT@TOKENS: of a prompt at a time, 0 for all.

    Without it as many as glmexport run reads.
    """
    name, _, piece = form.partition("@")
    module = [sys.executable, "-m", "benchmarks.runtimes.to_bundle", at.checkpoint.resolve()]
    bundle = at.once(f"ours-{name}", lambda out: run([*module, out, name, at.target]))
    return _genai("glmexport", form, bundle, at, int(piece or PREFILL_TOKENS))


def genai(at: Preparation, form: str) -> Runnable:
    """What onnxruntime-genai's own builder makes of a Llama of the same matrices, at its defaults for CPUs."""
    convert = [sys.executable, "-m", "benchmarks.runtimes.to_llama", at.checkpoint]
    llama = at.once("llama", lambda out: run([*convert, out]))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", llama, "-p", "int4", "-e", "cpu"]
    builder += ["-c", at.work / "cache"]
    level = ["--extra_options", "int4_accuracy_level=4"]
    model = at.once(f"genai-{form}", lambda out: run([*builder, "-o", out, *level]))
    return _genai("onnxruntime-genai", form, model, at)


def _genai(tool: str, form: str, model: Path, at: Preparation, piece: int = 0) -> Runnable:
    blocks = read = 0
    for tensor in onnx.load(model / "model.onnx", load_external_data=False).graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        size = math.prod(tensor.dims) * dtype.itemsize
        if not any(part in tensor.name for part in _UNREAD):
            read += size
            blocks += size if ".layers." in tensor.name and len(tensor.dims) > 1 else 0
    command = (sys.executable, str(_SCRIPTS / "by_onnxruntime_genai.py"), str(model), str(piece))
    return Runnable(tool, form, command, 8 * blocks / at.block_weights, read, 4)


def llama_cpp(at: Preparation, form: str) -> Runnable:
    """llama.cpp's own quantizer and kernels."""
    python = at.python("llama-cpp")
    folder = at.once("llama-cpp-libraries", _libraries) / "package" / "bins" / "linux-x64"
    script = _SCRIPTS / "to_gguf.py"
    plain = at.once("bf16.gguf", lambda out: run([python, script, at.checkpoint, out]))
    model = at.once(f"{form}.gguf", lambda out: run([python, script, at.checkpoint, out, form, folder, plain]))
    described = subprocess.run(
        [python, str(script), "--describe", str(model)], stdout=subprocess.PIPE, text=True, check=True
    )
    facts = json.loads(described.stdout)
    command = (python, str(_SCRIPTS / "by_llama_cpp.py"), str(model), str(folder))
    return Runnable("llama.cpp", form, command, 8 * facts["blocks"] / at.block_weights, facts["read"], 2)


def _libraries(out: Path) -> None:
    out.mkdir(parents=True)
    run(["npm", "pack", "--silent", "--pack-destination", out, LLAMA_CPP_PACKAGE])
    (archive,) = out.glob("*.tgz")
    shutil.unpack_archive(archive, out, filter="data")


def openvino(at: Preparation, form: str) -> Runnable:
    """optimum-intel's export, weights compressed by NNCF."""
    python = at.python("openvino")
    group = form.removeprefix("w4g").removesuffix("-sym")
    command: list[object] = [Path(python).with_name("optimum-cli"), "export", "openvino", "-m", at.checkpoint]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0"]
    command += ["--group-size", group, *(["--sym"] if form.endswith("-sym") else [])]
    model = at.once(f"openvino-{form}", lambda out: run([*command, out]))
    described = subprocess.run(
        [python, str(_SCRIPTS / "by_openvino.py"), "--describe", str(model)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    facts = json.loads(described.stdout)
    start = (python, str(_SCRIPTS / "by_openvino.py"), str(model))
    # The plugin's default on CPUs: 8 bits and a scale and a zero point (fp32) for every 32 of them.
    return Runnable("OpenVINO", form, start, 8 * facts["blocks"] / at.block_weights, facts["read"], 1.25)


def transformers(at: Preparation, form: str) -> Runnable:
    """The original in its own arithmetic."""
    config = at.config
    read = 2 * (at.block_weights + config["hidden_size"] * config["vocab_size"])
    command = (sys.executable, str(_SCRIPTS / "by_transformers.py"), str(at.checkpoint))
    return Runnable("transformers", form, command, 16, read, 2)


#: By name: how it is prepared, and the formats it is run in.
RUNTIMES: dict[str, tuple[Callable[[Preparation, str], Runnable], tuple[str, ...]]] = {
    "glmexport": (glmexport, ("w4g32", "w4g32-sym", "w4g64", "w4g128", "w4g128-sym")),
    "onnxruntime-genai": (genai, ("int4",)),
    "llama.cpp": (llama_cpp, ("Q4_0", "Q4_K_M")),
    "openvino": (openvino, ("w4g128",)),
    "transformers": (transformers, ("bf16",)),
}


def prepared(at: Preparation, names: list[str]) -> Iterator[tuple[str, Runnable | str]]:
    """Each of ``names`` (a runtime, or runtime:format) in its formats, or why it is missing."""
    for name in names:
        runtime, _, chosen = name.partition(":")
        make, formats = RUNTIMES[runtime]
        for form in [chosen] if chosen else formats:
            try:
                yield f"{runtime}, {form}", make(at, form)
            except (RuntimeFailed, RuntimeError, subprocess.CalledProcessError, OSError) as error:
                yield f"{runtime}, {form}", f"{type(error).__name__}: {error}"
