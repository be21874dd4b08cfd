"""The engine that runs a bundle: sessions, caches, sequences, sampling and speculation.

``open_engine`` in ``opening`` loads a bundle. ``core`` has what an engine is, and those that are plain ONNX Runtime;
serving, validation, tuning and devices all run these.
"""
