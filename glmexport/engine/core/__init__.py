"""The part of the engine that is plain ONNX Runtime: sessions, caches, sequences and greedy answers.

The program for devices has these very files in it, so that what is measured there is what serves here. Python 3.9,
numpy and onnxruntime are all that they need, and they import nothing of the package but each other.
"""
