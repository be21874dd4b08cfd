"""From our operators to the target's: one pass a file, chosen by capability."""

from glmexport.lowering.pipeline import lower, unsupported

__all__ = ["lower", "unsupported"]
