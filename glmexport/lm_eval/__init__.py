"""Bundles and checkpoints as a model of EleutherAI's lm-evaluation-harness; only this package needs that installed."""
