"""Fixtures of signed bundles: keys of openssl's making, and the small bundle under a signature."""

from builds import run, sample
from signatures import authority, keys, outcome, release, signed

__all__ = ["authority", "keys", "outcome", "release", "run", "sample", "signed"]
