"""Lowering of our operators to the target's: one pass a file, chosen by capability."""
