"""The engine that runs a bundle: sessions, caches, sequences, sampling and speculation.

``open_engine`` in ``opening`` loads a bundle. ``core`` defines an engine, and has those that are plain ONNX Runtime;
serving, validation, tuning and devices all run these.
"""
