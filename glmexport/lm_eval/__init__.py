"""Bundles and checkpoints as a model of EleutherAI's lm-evaluation-harness, which only this package needs installed."""
