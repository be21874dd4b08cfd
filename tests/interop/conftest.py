"""Fixtures of the real library for every test of this folder."""

from interop_jobs import gptqmodel, place

__all__ = ["gptqmodel", "place"]
