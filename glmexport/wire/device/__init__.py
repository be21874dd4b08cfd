"""The program that a device runs to answer a job, with Python 3.9 or later, numpy and onnxruntime.

It is carried to devices with ``engine/core`` and nothing else of the package, so nothing else is imported here, nor any
other library; tensors are read and written here because such a device may have no safetensors.
"""
