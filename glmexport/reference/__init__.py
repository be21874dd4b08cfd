"""The original's arithmetic: transformers' own layers, filled from the checkpoint block by block."""
