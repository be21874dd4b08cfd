"""Fixtures of the small bundle for every test of this folder."""

from builds import run, sample

__all__ = ["run", "sample"]
