"""The decoder as an ONNX graph of our own operators, built from the declaration."""
