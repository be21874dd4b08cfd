"""The posts of a page about a job, checked and kept: the device's facts, its speed, and every answer as it comes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from glmexport.bundle.manifest import FileEntry
from glmexport.devices.answers import RESULT_LIMITS
from glmexport.devices.job import QUESTIONS, RESULT, DeviceJob, JobRound, Result, SpeedResult, answer_path, tokens_path
from glmexport.devices.web_placement import placed_nodes
from glmexport.devices.web_runtime import VERSION
from glmexport.foundation.definition import read_json
from glmexport.foundation.files import sha256, write_atomically
from glmexport.foundation.machine import cores, instruction_sets, memory_bytes, processor_name, system_name
from glmexport.foundation.untrusted import DocumentLimits, parse_object
from glmexport.results.device import DeviceFacts

#: Most bytes of an event, and of a tensor file's header.
_EVENT, _HEADER = 1 << 22, 1 << 12
_EVENT_LIMITS = DocumentLimits(size=_EVENT, depth=16, values=200_000)
#: Parts of the names of adapters that compute in software: Chromium's, Mesa's, and that of Windows.
_SOFTWARE = ("swiftshader", "llvmpipe", "lavapipe", "basic render")

#: The type and the shape of a tensor.
_Form = tuple[str, tuple[int, ...]]


class Posted:
    """The result of a job as it grows.

    ``receive`` is called by the server's threads, one call at a time: the page waits for each answer.
    """

    def __init__(self, directory: Path, job: DeviceJob, results: Path, mode: str) -> None:
        self._directory, self._job, self._results, self._mode = directory, job, results, mode
        self.job_digest = job.digest(directory)
        self._forms = dict(_forms(directory / QUESTIONS, job))
        self._former = self._read()
        self._result: Result | None = None
        #: Most bytes under each name that a page may post to.
        self.accepted = {"event": _EVENT} | {
            f"result/{name}": _HEADER + sum(4 * math.prod(shape) for _, shape in forms.values())
            for name, forms in self._forms.items()
        }
        #: The name and version of the browser, and the page's part: speed, or answers.
        self.browser = self.part = ""

    @property
    def complete(self) -> bool:
        """Whether nothing was left to do before anything was posted."""
        former = self._former
        return former is not None and former.complete and former.device.runtime.startswith(_runtime(self._mode))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the job that still need a page; speed is not measured again."""
        measured = self._former is not None and self._former.speed is not None
        return ("speed", "answers") if self._job.speed and not measured else ("answers",)

    def left(self, folder: str) -> list[int]:
        """Return the indices of the texts (``answers``) or prompts (``tokens``) without an answer."""
        count = len(self._job.texts if folder == "answers" else self._job.prompts)
        return [index for index in range(count) if not (self._results / folder / f"{index}.safetensors").is_file()]

    def receive(self, name: str, body: bytes) -> tuple[dict[str, Any], bytes]:
        """Keep what was posted under ``name``, and return the event that it is, and the reply.

        Raises:
            ValueError: the post is not what was expected.
        """
        if name != "event":
            path = name.removeprefix("result/")
            self._check(path, body)
            (self._results / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._results / path, body)
            return {"kind": path.partition("/")[0]}, b""
        event = parse_object(body, _EVENT_LIMITS)
        try:
            return event, json.dumps(self._told(event)).encode()
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"The event lacks what its kind has: {type(error).__name__}: {error}.") from error

    def _told(self, event: dict[str, Any]) -> dict[str, Any]:
        """Keep an event, and return the reply to it."""
        reply: dict[str, Any] = {}
        match event["kind"]:
            case "facts":
                reply = self._begin(event)
            case "speed":
                used, source = renderer_peak_memory()
                rounds = tuple(JobRound.model_validate(each) for each in event["rounds"])
                speed = SpeedResult(
                    threads=event["threads"],
                    load_s=event["load_s"],
                    rounds=rounds,
                    peak_memory_bytes=used,
                    peak_memory_source=source,
                    memory_bandwidth_bytes_per_s=None,
                )
                self._update(speed=speed, speed_absent_because=None)
            case "placement":
                self._update(nodes=placed_nodes(event["lines"], self._directory / self._job.graphs.generation))
        return reply

    def finish(self) -> None:
        """Record that everything was answered."""
        files = tuple(
            FileEntry(path=name, size=path.stat().st_size, sha256=sha256(path))
            for name in sorted(self._forms)
            for path in [self._results / name]
        )
        self._update(files=files, complete=True)

    def _begin(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return what is left to do for this device; the answers of another one are removed.

        Raises:
            ValueError: an adapter was asked for, and this one is software.
        """
        device = self._device(facts)
        if device.emulated and self._mode == "webgpu":
            raise ValueError(f"There is no adapter but one in software ({device.adapter})")
        if self._result is None:
            former = self._former
            if former is None or former.device != device:
                former = None
                for path in self._results.glob("*/*.safetensors*"):
                    path.unlink()
            absent = device.emulated or (None if self._job.speed else "Speed was not asked for.")
            self._result = Result(
                job_digest=self.job_digest,
                device=device,
                speed=former.speed if former else None,
                speed_absent_because=former.speed_absent_because if former else absent or "It was not measured yet.",
                nodes=former.nodes if former else None,
                files=(),
                complete=False,
            )
            self._results.mkdir(parents=True, exist_ok=True)
            self._update()
        if self.part == "speed":
            return {"speed": not device.emulated, "texts": [], "prompts": []}
        return {"speed": False, "texts": self.left("answers"), "prompts": self.left("tokens")}

    def _device(self, facts: dict[str, Any]) -> DeviceFacts:
        adapter, name, emulated = facts["adapter"], None, None
        if adapter:
            name = " ".join(filter(None, map(adapter.get, ("vendor", "architecture", "device", "description"))))
        if name is not None and (adapter["fallback"] or any(each in name.lower() for each in _SOFTWARE)):
            emulated = (
                f"The WebGPU adapter ({name}) is software: it shows that answers are right, and nothing of speed."
            )
        simd = "relaxed SIMD" if facts["relaxed_simd"] else "SIMD" if facts["simd"] else "no SIMD"
        return DeviceFacts(
            system=system_name(),
            processor=processor_name(),
            instruction_sets=instruction_sets(),
            cores=cores(),
            memory_bytes=memory_bytes(),
            runtime=f"{_runtime(self._mode)}, {self.browser}, {facts['threads']} threads",
            provider="WebGpuExecutionProvider" if adapter else "CPUExecutionProvider",
            adapter=name,
            versions={
                "onnxruntime-web": facts["runtime"],
                "browser": self.browser,
                "user agent": facts["user_agent"],
                "WebAssembly": f"{simd}, {'isolated' if facts['isolated'] else 'not isolated'} from other origins",
            },
            emulated=emulated,
        )

    def _check(self, path: str, body: bytes) -> None:
        try:
            found = {name: (str(array.dtype), array.shape) for name, array in load(body).items()}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}.") from error
        expected = self._forms[path]
        if path.startswith("tokens/"):
            # The length of the answer is free.
            ((kind, (most,)),) = expected.values()
            given, shape = found.get("tokens", ("", ()))
            fits = found.keys() == expected.keys() and given == kind and len(shape) == 1 and 0 < shape[0] <= most
        else:
            fits = found == expected
        if not fits:
            raise ValueError(f"{path} has {found}, and {expected} were asked for.")

    def _read(self) -> Result | None:
        """Return the earlier result, if it is of this job."""
        try:
            former = read_json(Result, self._results / RESULT, RESULT_LIMITS)
        except (OSError, ValueError):
            return None
        return former if former.job_digest == self.job_digest else None

    def _update(self, **changes: Any) -> None:
        assert self._result is not None
        self._result = self._result.model_copy(update=changes)
        write_atomically(self._results / RESULT, (self._result.model_dump_json(indent=1) + "\n").encode())


def renderer_peak_memory() -> tuple[int | None, str]:
    """Return the peak resident memory of the page's process in bytes, and its source, or why there is none."""
    peaks = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "--type=renderer" not in child.cmdline():
                continue
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
        except (OSError, psutil.Error):
            continue
        peaks += [int(size) * 1024 for size in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)]
    if not peaks:
        return None, "This system does not tell what the page's process took."
    return max(peaks), "VmHWM of the page's process"


def _runtime(mode: str) -> str:
    return f"onnxruntime-web {VERSION} ({mode})"


def _forms(questions: Path, job: DeviceJob) -> Iterator[tuple[str, dict[str, _Form]]]:
    """Return every file of the results and the tensors in it."""
    with safe_open(questions, "numpy") as file:
        asked = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for index in range(len(job.texts)):
        shape = asked[f"text.{index}.tokens"]
        forms: dict[str, _Form] = {
            "logits": ("float32", shape),
            "log_others": ("float32", shape[:1]),
            "target": ("float32", shape[:1]),
            "top": ("int32", shape[:1]),
        }
        audit = asked.get(f"text.{index}.audit")
        if audit is not None:
            forms["audit"] = ("float32", (*audit, job.vocabulary_size))
        yield answer_path(index), forms
    for index, most in enumerate(job.prompts):
        yield tokens_path(index), {"tokens": ("int32", (most,))}
