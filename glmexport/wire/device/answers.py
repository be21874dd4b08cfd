"""The bundle's graphs in ONNX Runtime: logits of texts, greedy answers, their speed, and where nodes run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glmexport.wire.device.facts import memory_bandwidth, peak_memory
from glmexport.wire.standalone import Failure, Tell

#: Rows whose logarithms are taken together, in fp64.
_ROWS = 64
#: Positions of a prompt that are computed together, and a step in the size of caches of fixed capacity.
_CHUNK = 256
#: Tokens of a prompt and generated ones, both shapes that the graph is run in, for a profile.
_PROFILED = 8, 3
_INTEGERS = frozenset(("int64", "int32", "uint64", "uint32", "bool"))
#: ONNX Runtime's own bound of what is small, elements.
_SMALL = 100
#: ONNX's number of the type.
_BFLOAT16 = 16


class Session:
    """One of the job's graphs; ``profile`` begins the name of a profile."""

    def __init__(self, job: dict[str, Any], folder: Path, graph: str, threads: int, profile: Path | None = None):
        import onnxruntime

        self._job, self._folder, self._threads, self._profile = job, folder, threads, profile
        self._graphs, self._context, self._ort = job["graphs"], job["context_length"], onnxruntime
        name = job["provider"]["name"]
        available = onnxruntime.get_available_providers()
        if name not in available:
            raise Failure(
                "provider",
                f"The bundle runs on {name}, which the device's ONNX Runtime does not have; it has "
                f"{', '.join(available)}.",
                "Install the ONNX Runtime that has it, or take a device of the target's class.",
            )
        self._session = self._open(self._graphs[graph])
        self.provider = self._session.get_providers()[0]

    def logits(self, ids: Any) -> Any:
        """Logits [length, vocabulary] fp32 after each of ``ids`` [length], from an empty cache."""
        import numpy as np

        value = self._ort.OrtValue.ortvalue_from_numpy
        feeds = {
            self._graphs["input_ids"]: value(ids.astype(np.int64)[None]),
            self._graphs["attention_mask"]: value(np.ones((1, len(ids)), np.int64)),
            **self._empty(len(ids)),
        }
        return self._session.run_with_ort_values([self._graphs["logits"]], feeds)[0].numpy()[0]

    def stream(self, prompt: Sequence[int], most: int) -> Iterator[int]:
        """The most likely token after ``prompt``, each added to it, until the context or ``most`` tokens are full."""
        import numpy as np

        most = min(most, self._context - len(prompt))
        room = min(-(-(len(prompt) + most) // _CHUNK) * _CHUNK, self._context)
        caches = self._empty(room)
        new, length = np.asarray(prompt, np.int64), 0
        for _ in range(most):
            for start in range(0, len(new), _CHUNK):
                ids = new[start : start + _CHUNK]
                length += len(ids)
                logits, caches = self._step(ids[None], length, caches)
            token = int(logits[0, -1].argmax())
            yield token
            new = np.asarray([token], np.int64)

    def end_profile(self) -> list[Path]:
        """The file of every graph's profile, which is whole then."""
        return [Path(self._session.end_profiling())]

    def _open(self, graph: str) -> Any:
        """A graph by its path below the job's folder."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        for entry, value in self._job["config"].items():
            options.add_session_config_entry(entry, value)
        if self._profile:
            prefix = f"{self._profile}-{Path(graph).stem}"
            options.enable_profiling, options.profile_file_prefix = True, prefix
        provider = (self._job["provider"]["name"], self._job["provider"]["options"])
        return self._ort.InferenceSession(str(self._folder / graph), options, providers=[provider])

    def _empty(self, capacity: int) -> dict[str, Any]:
        """Caches of one sequence, of which nothing is computed."""
        import numpy as np

        sizes = {"batch": 1, "past_sequence": 0, "capacity": capacity}
        found = {}
        for cache in self._graphs["caches"]:
            shape = [sizes.get(size, size) for size in cache["shape"]]
            if cache["dtype"] == "bfloat16":
                # numpy has no such type, so its bits.
                bits = np.zeros(shape, np.uint16)
                found[cache["input"]] = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
            else:
                found[cache["input"]] = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, cache["dtype"]))
        return found

    def _step(self, ids: Any, length: int, caches: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Logits [1, 1, vocabulary] behind ``ids`` [1, new], which end at ``length``, and the caches then."""
        import numpy as np

        grows = self._graphs["cache_kind"] == "growing"
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._graphs["input_ids"], np.ascontiguousarray(ids))
        binding.bind_cpu_input(self._graphs["attention_mask"], np.ones((1, length), np.int64))
        binding.bind_output(self._graphs["logits"], "cpu")
        for cache in self._graphs["caches"]:
            held = caches[cache["input"]]
            binding.bind_ortvalue_input(cache["input"], held)
            if grows:
                binding.bind_output(cache["output"], "cpu")
            else:
                # One buffer: new positions are written into it, and nothing is copied.
                binding.bind_ortvalue_output(cache["output"], held)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if grows:
            caches = {cache["input"]: grown for cache, grown in zip(self._graphs["caches"], outputs[1:])}
        return outputs[0].numpy(), caches


def open_session(
    job: dict[str, Any], folder: Path, graph: str, threads: int, profile: Path | None = None
) -> Session:
    """The session that the job's graphs need; ``graph`` is scoring or generation."""
    from glmexport.wire.device.fixed import FixedSession

    # A job of an older glmexport does not say.
    kind = FixedSession if job["graphs"].get("fixed") else Session
    return kind(job, folder, graph, threads, profile)


def text_answer(logits: Any, tokens: Any, targets: Any, audit: Any) -> dict[str, Any]:
    """What is kept of logits [positions, vocabulary] fp32: those of ``tokens`` [positions, k], of ``targets``
    [positions], of all tokens at the positions ``audit``, and the logsumexp of all that are not among ``tokens``.
    """
    import numpy as np

    tokens = tokens.astype(np.int64)
    others = np.full(len(logits), -math.inf, np.float32)
    if tokens.shape[1] < logits.shape[1]:
        for start in range(0, len(logits), _ROWS):
            rows = logits[start : start + _ROWS].astype(np.float64)
            np.put_along_axis(rows, tokens[start : start + _ROWS], -math.inf, 1)
            most = rows.max(1)
            others[start : start + _ROWS] = most + np.log(np.exp(rows - most[:, None]).sum(1))
    kept = {
        "logits": np.take_along_axis(logits, tokens, 1),
        "log_others": others,
        "target": np.take_along_axis(logits, targets.astype(np.int64)[:, None], 1)[:, 0],
        "top": logits.argmax(1).astype(np.int32),
    }
    return kept if audit is None else {**kept, "audit": logits[audit]}


def greedy(session: Session, prompt: Sequence[int], most: int, ends: Sequence[int]) -> Any:
    """Tokens [n] int32 until an end token, which is the last, or ``most``."""
    import numpy as np

    tokens = []
    for token in session.stream(prompt, most):
        tokens.append(token)
        if token in ends:
            break
    return np.asarray(tokens, np.int32)


def measure_speed(job: dict[str, Any], folder: Path, threads: int, tell: Tell) -> dict[str, Any]:
    """Rounds, in a process that has done nothing before but check files, so that its peak memory is theirs."""
    asked, began = job["speed"], time.perf_counter()
    session = open_session(job, folder, "generation", threads)
    load = time.perf_counter() - began
    rounds: list[dict[str, Any]] = []

    def generate() -> dict[str, Any]:
        last, times = time.perf_counter(), []
        for _ in session.stream(asked["prompt"], asked["generated_tokens"]):
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return {"ttft_s": times[0], "steps_s": times[1:]}

    generate()
    begun = time.monotonic()
    while len(rounds) < asked["rounds"] or time.monotonic() - begun < asked["seconds"]:
        rounds.append(generate())
        tell({"event": "round", "index": len(rounds)})
    used, source = peak_memory()
    return {
        "threads": threads,
        "load_s": load,
        "rounds": rounds,
        "peak_memory_bytes": used,
        "peak_memory_source": source,
        "memory_bandwidth_bytes_per_s": memory_bandwidth(threads),
    }


def placed_nodes(job: dict[str, Any], folder: Path, results: Path, threads: int) -> list[dict[str, Any]]:
    """Which provider ran which node of the generation graph, from ONNX Runtime's own profile of a few tokens."""
    session = open_session(job, folder, "generation", threads, results / "profile")
    for _ in session.stream(job["speed"]["prompt"][: _PROFILED[0]], _PROFILED[1]):
        pass
    nodes = []
    for profile in session.end_profile():
        nodes += _nodes(json.loads(profile.read_text("utf-8")))
        profile.unlink()
    return nodes


def _nodes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one graph."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") != "Node" or not facts.get("provider"):
            continue
        name = event["name"].replace("_kernel_time", "")
        # A node that is small with one token but not with several is not small.
        small = _small(facts) and found.get(name, {}).get("small", True)
        found[name] = {"name": name, "operator": facts["op_name"], "provider": facts["provider"], "small": small}
    return list(found.values())


def _small(facts: dict[str, Any]) -> bool:
    """Whether all that a node read and wrote are few integers; Shape and Size read nothing of their input."""
    read = [] if facts["op_name"] in ("Shape", "Size") else facts.get("input_type_shape", [])
    tensors = [item for each in [*read, *facts.get("output_type_shape", [])] for item in each.items()]
    return all(kind in _INTEGERS and math.prod(shape) <= _SMALL for kind, shape in tensors)
