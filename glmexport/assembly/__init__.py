"""Lowered graphs, their weights and a manifest become a bundle; the weights of a bundle are read back."""
