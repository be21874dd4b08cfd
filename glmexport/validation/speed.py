"""Time to first token, prefill and decode rate and peak memory of one runtime, in a process of its own.

A process of its own, because peak memory is a property of a process and because two runtimes in one would share
thread pools and caches. ``python -m glmexport.validation.speed REQUEST`` measures and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from glmexport.definition import Definition
from glmexport.errors import MachineError
from glmexport.loop import read_loop
from glmexport.validation.machine import peak_memory
from glmexport.validation.results import Speed

Runtime = Literal["onnxruntime-genai", "transformers"]


class SpeedRequest(Definition):
    """What to measure. ``prompt`` are fixed token ids, the same for every runtime."""

    runtime: Runtime
    directory: str
    prompt: tuple[int, ...]
    generated_tokens: int
    repetitions: int
    threads: int


def measure_speed(request: SpeedRequest) -> Speed:
    """Run ``request`` in a process of its own; medians over its repetitions, after one warm-up.

    Raises:
        MachineError: the process failed, for example for lack of memory.
    """
    # The child must find this package however it was installed, and must not inherit limits on threads.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(request.threads), "PYTHONPATH": path}
    process = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "glmexport.validation.speed", request.model_dump_json()],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"Measuring the speed of {request.runtime} failed (exit {process.returncode}): {last}.",
            next_step="Free memory, then run the same command again.",
        )
    return Speed.model_validate_json(process.stdout.splitlines()[-1])


#: Yields a token after each step of one generation; the first step is the prefill.
Generation = Callable[[], Iterator[None]]


def _measure(request: SpeedRequest) -> Speed:
    runtime = _transformers
    if request.runtime == "onnxruntime-genai":
        runtime = _latent_loop if read_loop(Path(request.directory)) else _genai
    started = time.perf_counter()
    with runtime(request) as (name, generate):
        load = time.perf_counter() - started
        runs = [_time(generate) for _ in range(request.repetitions + 1)][1:]
    first = statistics.median(run[0] for run in runs)
    rest = statistics.median(run[1] / (request.generated_tokens - 1) for run in runs)
    return Speed(
        runtime=name,
        threads=request.threads,
        load_s=load,
        ttft_s=first,
        prefill_tokens_per_s=len(request.prompt) / first,
        decode_tokens_per_s=1 / rest,
        peak_memory_bytes=peak_memory(),
    )


def _time(generate: Generation) -> tuple[float, float]:
    """Seconds of the first step and of all others."""
    started = time.perf_counter()
    steps = generate()
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - started, time.perf_counter() - first


@contextmanager
def _genai(request: SpeedRequest) -> Iterator[tuple[str, Generation]]:
    import numpy as np
    import onnxruntime_genai

    config = onnxruntime_genai.Config(request.directory)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": request.threads}}}}
    config.overlay(json.dumps(options))
    model = onnxruntime_genai.Model(config)

    def generate() -> Iterator[None]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        total = len(request.prompt) + request.generated_tokens
        parameters.set_search_options(max_length=total, min_length=total, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([request.prompt], np.int32))
        for _ in range(request.generated_tokens):
            generator.generate_next_token()
            yield

    yield f"onnxruntime-genai {onnxruntime_genai.__version__}", generate


@contextmanager
def _latent_loop(request: SpeedRequest) -> Iterator[tuple[str, Generation]]:
    """A bundle whose caches onnxruntime-genai does not know, in its own loop."""
    import onnxruntime

    from glmexport.validation.latent_loop import LatentLoop

    directory = Path(request.directory)
    config = read_loop(directory)
    assert config is not None
    loop = LatentLoop(directory, config, request.threads)

    def generate() -> Iterator[None]:
        for _ in islice(loop.start([request.prompt]), request.generated_tokens):
            yield

    yield f"onnxruntime {onnxruntime.__version__} over latents", generate


@contextmanager
def _transformers(request: SpeedRequest) -> Iterator[tuple[str, Generation]]:
    import torch
    import transformers

    torch.set_num_threads(request.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request.directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    prompt = torch.tensor([request.prompt])

    def generate() -> Iterator[None]:
        ids, cache = prompt, None
        for _ in range(request.generated_tokens):
            with torch.inference_mode():
                output: Any = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            yield

    yield f"transformers {transformers.__version__}, fp32", generate


if __name__ == "__main__":
    sys.stdout.write(_measure(SpeedRequest.model_validate_json(sys.argv[1])).model_dump_json() + "\n")
