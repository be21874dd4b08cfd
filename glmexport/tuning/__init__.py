"""The search for the fastest of a target's legal settings on this machine, and their cost in divergence."""
