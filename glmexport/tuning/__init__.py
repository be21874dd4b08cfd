"""Which of a target's legal settings are fastest on this machine, and what they cost in divergence."""
