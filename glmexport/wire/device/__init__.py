"""What a device runs to answer a job: Python 3.9 or later, numpy and onnxruntime.

It is carried to devices that have nothing of the package around it, so nothing of that is imported here, nor any other
library; tensors are read and written here because such a device may have no safetensors.
"""
