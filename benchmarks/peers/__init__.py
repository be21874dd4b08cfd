"""Other quantizers on our calibration tokens: what each can do, and a way to run it in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import exit_status

_SECONDS = 4 * 3600
#: Of what a peer prints, its warnings are kept, so that a fallback does not pass unseen.
_TELLING = re.compile(r"\bwarn|fallback|fall back|fail|mock|not supported|error", re.IGNORECASE)
_KEPT_LINES = 40
#: Colours, and folders of this machine: neither belongs in a record.
_NOISE = re.compile(r"\x1b\[[\d;]*m|(?<![\w.])/[\w.+-]+(?:/[\w.+-]+)+/")


@dataclass(frozen=True)
class Peer:
    """A quantizer, the settings of its script, and which formats they have."""

    name: str
    settings: tuple[str, ...]
    #: Lowest KL on the demo among the settings that were tried.
    best: str = "default"
    #: Settings without a symmetric format.
    asymmetric_only: tuple[str, ...] = ()
    #: The only group size, where there is but one; otherwise every one that divides the columns.
    group_size: int | None = None
    #: Settings that read the calibration tokens; all others see the weights alone.
    calibrated: tuple[str, ...] = ()
    #: Can mix formats within a number of bits per weight.
    mixes: bool = False

    def lacks(self, setting: str, bits: int, group_size: int, symmetric: bool) -> str | None:
        """Why the setting does not exist in this format; None if it does."""
        if setting not in self.settings:
            return f"it has no setting {setting}"
        if bits != 4:
            return f"its script has 4 bits only, not {bits}"
        if self.group_size not in (None, group_size):
            return f"it has groups of {self.group_size} only"
        if symmetric and setting in self.asymmetric_only:
            return "it has no symmetric format"
        return None


_GPTQMODEL = ("default", "mse", "mse-2.4", "act-order", "act-order-mse", "no-order", "bf16")
#: Our solver with one part left out or changed at a time.
ONE_AT_A_TIME = (
    "default",
    "without asymmetric target",
    "without folds",
    "without polish",
    "4 rounds of polish",
    "without scale search",
    "in stored order",
)
#: Its parts added one after another; the default adds the asymmetric target.
ADDED_UP = (
    "nearest",
    "nearest, searched",
    "GPTQ alone",
    "GPTQ, scale search",
    "GPTQ, scale search, group order",
    "without asymmetric target",
    "default",
)
#: The default by whatever arithmetic a build would choose on this machine.
AS_BUILT = "as built"
_GLMEXPORT = tuple(dict.fromkeys((*ONE_AT_A_TIME, *ADDED_UP, AS_BUILT)))
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        # The one under test, in the benchmark's own environment.
        Peer(
            "glmexport",
            _GLMEXPORT,
            calibrated=tuple(name for name in _GLMEXPORT if not name.startswith("nearest")),
            mixes=True,
        ),
        Peer("gptqmodel", _GPTQMODEL, best="act-order-mse", calibrated=_GPTQMODEL),
        Peer(
            "auto-round",
            ("default", "light", "best", "algorithm-extension", "rtn"),
            calibrated=("default", "light", "best", "algorithm-extension", "rtn"),
        ),
        Peer(
            "onnxruntime",
            ("default", "rtn", "k_quant", "hqq", "gptq", "gptq-act-order-mse"),
            best="hqq",
            asymmetric_only=("k_quant", "hqq"),
            calibrated=("gptq", "gptq-act-order-mse"),
        ),
        Peer("hqq", ("default", "axis-0"), asymmetric_only=("default", "axis-0")),
        Peer(
            "llama-cpp",
            ("default", "imatrix", "Q4_K_M", "Q4_K_M-imatrix"),
            asymmetric_only=("Q4_K_M", "Q4_K_M-imatrix"),
            group_size=32,
            calibrated=("imatrix", "Q4_K_M-imatrix"),
        ),
        Peer("llm-compressor", ("default", "mse"), calibrated=("default", "mse")),
        Peer(
            "nncf",
            ("default", "scale-estimation", "awq", "awq-scale-estimation"),
            best="awq-scale-estimation",
            calibrated=("scale-estimation", "awq", "awq-scale-estimation"),
        ),
    )
}

#: Peers that were looked at and do not run here, and why.
NOT_RUN: dict[str, str] = {
    "nncf GPTQ": "NNCF 3.4 refuses gptq for torch models; it is for OpenVINO models only.",
    "mixes of auto-round and nncf": "both can mix formats too; their scripts here give all linears the same.",
    "onnxruntime nvidia_awq": "needs nvidia-modelopt, which calibrates on text of its own, not on given tokens.",
}


class PeerFailed(RuntimeError):
    """A peer's script failed or took too long; the message ends with the last that it printed."""


def run_peer(
    environments: Path,
    name: str,
    setting: str,
    checkpoint: Path,
    calibration: Path,
    out: Path,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    bits_per_weight: float | None = None,
    seconds: int = _SECONDS,
) -> dict[str, Any]:
    """Quantize with a peer, leave the dequantized weights at ``out``, and return what is known about the run.

    The environment is made if it is missing. The metadata of ``out`` are returned with ``warnings``: lines of the
    peer's output that tell of warnings or fallbacks.

    Raises:
        ValueError: the peer has no such setting in this format.
        PeerFailed: the script failed, or ran longer than ``seconds``.
        EnvironmentFailed: the environment could not be made.
    """
    # Here, so that the module can be run without having been imported before.
    from benchmarks.peers.environments import create, interpreter

    lack = PEERS[name].lacks(setting, bits, group_size, symmetric)
    if lack:
        raise ValueError(f"{name}, {setting}: {lack}")
    if name == "glmexport":
        python = Path(sys.executable)
    else:
        create(environments, name)
        python = interpreter(environments, name).absolute()
    script = Path(__file__).with_name(f"by_{name.replace('-', '_')}.py").resolve()
    command: list[object] = [
        python,
        script,
        checkpoint.resolve(),
        calibration.resolve(),
    ]
    command += [out.resolve(), "--bits", bits, "--group-size", group_size, "--setting", setting]
    command += ["--symmetric"] if symmetric else []
    command += ["--bits-per-weight", bits_per_weight] if bits_per_weight else []
    out.unlink(missing_ok=True)
    # Neither our packages nor the hub: a peer that misses a file should say so and not fetch another.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    # Peers leave logs and working folders where they run; progress bars go to a file, not to memory.
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+b") as output:
        code = exit_status(command, output, seconds, cwd=Path(folder), env=environment)
        if code is None:
            raise PeerFailed(f"{name} {setting}: longer than {seconds} s\n{_tail(output)}")
        if code:
            raise PeerFailed(f"{name} {setting}: exit status {code}\n{_tail(output)}")
        return metadata(out) | {"warnings": list(_telling(Path(output.name)))}


def metadata(path: Path) -> dict[str, Any]:
    """What a peer's script wrote about its run."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def _tail(output: Any, length: int = 4000) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - length))
    return str(output.read().decode("utf-8", "replace"))


def _telling(path: Path) -> Iterator[str]:
    seen: set[str] = set()
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            # What a progress bar overwrote ends in a carriage return.
            text = _NOISE.sub("", line.strip().rsplit("\r", 1)[-1])[:300]
            # Lines that begin with a quotation mark are settings, printed as JSON.
            if not text.startswith('"') and _TELLING.search(text) and text not in seen:
                seen.add(text)
                yield text
                if len(seen) == _KEPT_LINES:
                    return
