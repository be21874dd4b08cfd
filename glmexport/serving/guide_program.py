"""The process that makes an answer follow a grammar; it is run alone, knows nothing of the server, and may be killed.

A grammar comes from a request, and compiling one, or finding the tokens that it allows next, can take any time and
memory, or abort. onnxruntime-genai does both, on a graph without weights that computes nothing: the logits are sent.

Its arguments are the descriptor of a socket, the bundle, and the bytes and seconds of CPU that it may take. It is sent
the graph, then grammars and logits, and says ``ready``, nothing or what is wrong with a grammar, and a token.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

#: The first byte of a message with a grammar, in contrast to one with logits.
GRAMMAR = b"g"
_SETTINGS = {
    "filename": "model.onnx",
    "hidden_size": 1,
    "head_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 0,
    "session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1},
}


def _model(bundle: str, graph: bytes) -> Any:
    import onnxruntime_genai

    settings = onnxruntime_genai.Config(bundle)
    settings.clear_providers()
    overlay = {"model": {"decoder": _SETTINGS}, "search": {"past_present_share_buffer": False}}
    settings.overlay(json.dumps(overlay))
    settings.add_model_data("model.onnx", graph)
    return onnxruntime_genai.Model(settings)


def _generator(model: Any, asked: dict[str, Any]) -> Any:
    """Return the generator that chooses tokens by a grammar; its one prompt token is no part of the answer."""
    import numpy as np
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=1, max_length=asked["tokens"] + 1, **asked["options"])
    parameters.set_guidance(asked["kind"], asked["text"])
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([asked["lead"]], np.int32))
    return generator


def _chosen(generator: Any, logits: bytes) -> dict[str, object]:
    """Return the token by ``logits``, fp32, and whether none follows."""
    import numpy as np

    if generator.is_done():
        return {"token": None, "done": True}
    # The step is computed first: logits can only be set after it.
    generator.get_logits()
    generator.set_logits(np.frombuffer(logits, np.float32).reshape(1, 1, -1).copy())
    generator.generate_next_token()
    return {"token": int(generator.get_next_tokens()[0]), "done": bool(generator.is_done())}


def _limit(memory: int, seconds: int) -> None:
    """Limit this process to so much more memory and CPU time than it has taken already."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    # Other systems do not say how much is taken, and only time is limited.
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123
            limits[resource.RLIMIT_AS] = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def main() -> None:
    """Serve grammars until nobody is at the other end."""
    # The server ends this process, after the answers that wait.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection: Connection[bytes, bytes] = Connection(int(sys.argv[1]))
    os.nice(5)
    model = _model(sys.argv[2], connection.recv_bytes())
    # The common part of all grammars, such as the vocabulary by its bytes, is made with the first one: seconds for
    # GLM's.
    _generator(model, {"kind": "json_schema", "text": '{"type": "null"}', "options": {}, "tokens": 1, "lead": 0})
    _limit(int(sys.argv[3]), int(sys.argv[4]))
    connection.send_bytes(b"ready")
    generator = None
    while True:
        try:
            sent = connection.recv_bytes()
        except EOFError:
            return
        try:
            if sent[:1] == GRAMMAR:
                generator = None
                generator = _generator(model, json.loads(sent[1:]))
                connection.send_bytes(b"")
            else:
                connection.send_bytes(json.dumps(_chosen(generator, sent[1:])).encode())
        except (RuntimeError, MemoryError) as error:
            connection.send_bytes(b"!" + (str(error) or type(error).__name__).splitlines()[0][:300].encode())


if __name__ == "__main__":
    main()
