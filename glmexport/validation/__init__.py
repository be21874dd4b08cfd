"""The bundle's answers and speed against the original's, measured on the exported graph where it runs.

results     the vocabulary of what is measured
texts       what is asked
reference   the original's answers, block by block
session     the bundle's answers, from ONNX Runtime
divergence  how far two distributions are apart
fidelity    statistics per language
performance speed, memory, energy and placement of the bundle, beside the original's
speed       runtimes that take turns, in processes of their own
machine     what this machine is
gates       limits and verdicts
run         all of it
"""
