"""Names of a graph's inputs and outputs."""

from __future__ import annotations

#: Names that onnxruntime-genai and optimum agree on; ``kind`` is key or value, or for the caches that only our own
#: loop holds, latent or index.
INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST = "past_key_values.{layer}.{kind}"
PRESENT = "present.{layer}.{kind}"
LATENT, INDEX = "latent", "index"
