"""The names of a bundle's files, and of the inputs and outputs of its graphs."""

from __future__ import annotations

from typing import Literal

#: Names that onnxruntime-genai and optimum agree on; ``kind`` is key or value, or for the caches that only our own
#: loop holds, latent or index.
INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
#: Inputs of a graph of fixed shapes: the position of each new token, and the index of the one whose logits it gives.
POSITION_IDS, ASKED = "position_ids", "asked_position"
#: Logits of every new position of a short step, where LOGITS are those of the last one only.
RECENT_LOGITS = "recent_logits"
#: Hidden states of every new position after the final norm, and the input of a draft graph that takes them.
HIDDEN, PAST_HIDDEN = "hidden_states", "past_hidden_states"
#: Most new positions of a step that gives the logits of all; a longer one, such as a prefill, gives those of the last.
SHORT_STEP = 16
PAST = "past_key_values.{layer}.{kind}"
PRESENT = "present.{layer}.{kind}"
#: The block that a decoder layer's nodes and weights belong to.
BLOCK_NAME = "block_{layer:03d}"
LATENT, INDEX = "latent", "index"
#: The residual stream before and after a part of the model.
STREAM_IN, STREAM_OUT = "stream_in", "stream_out"

#: The files of graphs, which are the same in every bundle: no other name is read from a file.
MODEL: Literal["model.onnx"] = "model.onnx"
DRAFT: Literal["draft.onnx"] = "draft.onnx"
#: The graph for one token in a bundle of fixed shapes, whose other graphs are for a chunk of a prompt.
STEP: Literal["step.onnx"] = "step.onnx"

GENAI_CONFIG = "genai_config.json"

#: The names of the graph's inputs and outputs by onnxruntime-genai's names.
INPUTS = {
    "input_ids": INPUT_IDS,
    "attention_mask": ATTENTION_MASK,
    "past_key_names": PAST.format(layer="%d", kind="key"),
    "past_value_names": PAST.format(layer="%d", kind="value"),
}

OUTPUTS = {
    "logits": LOGITS,
    "present_key_names": PRESENT.format(layer="%d", kind="key"),
    "present_value_names": PRESENT.format(layer="%d", kind="value"),
}

SCORING = "scoring.onnx"

#: The file of the powers of two that were moved between tensors, which a checkpoint of the bundle needs.
FOLDS = "folds.safetensors"

WEIGHTS = "weights"
