"""The room that every other one stands on: errors, definitions, files, progress, and facts about this machine.

Nothing here imports another room of the package, and nothing here needs torch.
"""
