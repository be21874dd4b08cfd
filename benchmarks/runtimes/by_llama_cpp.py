"""llama.cpp by its C interface: the shared library of node-llama-cpp's package, which picks the processor's kernels.

    python by_llama_cpp.py MODEL.gguf LIBRARIES CAPACITY THREADS VOCABULARY

Decodes as its own llama-bench does: one llama_decode a step, logits of the last position only.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from common import Runtime, serve

#: llama_context_params begins with n_ctx, n_batch and n_ubatch; what follows changes from release to release, so the
#: rest of each struct stays as llama.cpp's own defaults leave it.
_CAPACITY, _BATCH, _MICRO_BATCH = 0, 1, 2
#: llama-bench's own.
_CALL_TOKENS, _BATCH_TOKENS = 2048, 512


class Parameters(ctypes.Structure):
    """Any of llama.cpp's structs of parameters: at least as large, and like them passed in memory."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


def library(folder: Path) -> ctypes.CDLL:
    """The library with its backends, and the types of what is called."""
    (base,) = folder.glob("libggml.*so*")
    (path,) = folder.glob("libllama.*so*")
    ggml = ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_print_system_info", ctypes.c_char_p, []),
        ("llama_model_default_params", Parameters, []),
        ("llama_context_default_params", Parameters, []),
        ("llama_model_quantize_default_params", Parameters, []),
        ("llama_model_quantize", ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Parameters]),
        ("llama_init_from_model", pointer, [pointer, Parameters]),
        ("llama_set_n_threads", None, [pointer, whole, whole]),
        ("llama_n_ctx", ctypes.c_uint32, [pointer]),
        ("llama_n_batch", ctypes.c_uint32, [pointer]),
        ("llama_n_ubatch", ctypes.c_uint32, [pointer]),
        ("llama_n_threads", whole, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_batch_get_one", Batch, [pointer, whole]),
        ("llama_decode", whole, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, whole]),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_backend_init()
    return llama


class LlamaCpp(Runtime):
    def __init__(self, model: Path, folder: Path, capacity: int, threads: int, vocabulary: int) -> None:
        self.llama = library(folder)
        self.vocabulary = vocabulary
        loaded = self.llama.llama_model_load_from_file(str(model).encode(), self.llama.llama_model_default_params())
        if not loaded:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        parameters = self.llama.llama_context_default_params()
        # Whole multiples of 256, as llama.cpp rounds it.
        capacity = -(-capacity // 256) * 256
        asked = {_CAPACITY: capacity, _BATCH: min(_CALL_TOKENS, capacity), _MICRO_BATCH: _BATCH_TOKENS}
        for index, value in asked.items():
            parameters.words[index] = value
        self.context = self.llama.llama_init_from_model(loaded, parameters)
        self.llama.llama_set_n_threads(self.context, threads, threads)
        found = [getattr(self.llama, name)(self.context) for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")]
        if found != list(asked.values()) or self.llama.llama_n_threads(self.context) != threads:
            raise RuntimeError(f"llama.cpp took {found} for {asked}: its parameters have another layout")
        flags = [part.strip() for part in self.llama.llama_print_system_info().decode().split("|")]
        self.name = "llama.cpp, " + ", ".join(part.split(" = ")[0].split(": ")[-1] for part in flags if "= 1" in part)

    def start(self, ids: list[int]) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        for begin in range(0, len(ids), _CALL_TOKENS):
            part = np.array(ids[begin : begin + _CALL_TOKENS], np.int32)
            batch = self.llama.llama_batch_get_one(part.ctypes.data, len(part))
            failed = self.llama.llama_decode(self.context, batch)
            if failed:
                raise RuntimeError(f"llama_decode: {failed}")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        self.best = int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def step(self) -> None:
        self.extend([self.best])


if __name__ == "__main__":
    model, folder, *numbers = sys.argv[1:]
    capacity, threads, vocabulary = map(int, numbers)
    serve(LlamaCpp, Path(model), Path(folder), capacity, threads, vocabulary, vocabulary=vocabulary)
