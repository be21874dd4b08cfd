"""Matrices become codes, scales and zero points: pure functions on arrays, and the walk that applies them."""
