"""Lowered graphs, their weights and what is known of them become a bundle; the weights of one are read back."""
