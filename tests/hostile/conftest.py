"""The small bundle, and the command line in process."""

from builds import run, sample

__all__ = ["run", "sample"]
