"""Fixtures of the hub for every test of this folder."""

from fake_hub import cache, hub

__all__ = ["cache", "hub"]
