"""Names of a bundle's files, and of the inputs and outputs of its graphs."""

from __future__ import annotations

from typing import Literal

#: Names that onnxruntime-genai and optimum agree on; ``kind`` is key or value, or for the caches that only our own
#: loop holds, latent or index.
INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
#: Of a graph of fixed shapes: where each new token is, and which of them has its logits computed.
POSITION_IDS, ASKED = "position_ids", "asked_position"
#: Logits of every new position of a short step, where LOGITS are those of the last one only.
RECENT_LOGITS = "recent_logits"
#: Of every new position behind the final norm, and the input of the same that a draft graph has.
HIDDEN, PAST_HIDDEN = "hidden_states", "past_hidden_states"
#: New positions of a step of which all have logits; of a longer one, as a prefill is, only the last has.
SHORT_STEP = 16
PAST = "past_key_values.{layer}.{kind}"
PRESENT = "present.{layer}.{kind}"
#: The block that a decoder layer's nodes and weights belong to.
BLOCK_NAME = "block_{layer:03d}"
LATENT, INDEX = "latent", "index"
#: The residual stream before and behind a part of the model.
STREAM_IN, STREAM_OUT = "stream_in", "stream_out"

#: Files of graphs, which are those of every bundle: no other name is read from a file.
MODEL: Literal["model.onnx"] = "model.onnx"
DRAFT: Literal["draft.onnx"] = "draft.onnx"
#: In a bundle of fixed shapes, whose other graphs are for a chunk of a prompt.
STEP: Literal["step.onnx"] = "step.onnx"

GENAI_CONFIG = "genai_config.json"

#: Names of the graph's inputs and outputs, as onnxruntime-genai is told them.
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

#: Which powers of two were moved between tensors: what is needed to make a checkpoint of the bundle.
FOLDS = "folds.safetensors"

WEIGHTS = "weights"
