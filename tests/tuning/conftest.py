"""Fixtures of the small bundle for every test of this folder."""

from builds import sample

__all__ = ["sample"]
