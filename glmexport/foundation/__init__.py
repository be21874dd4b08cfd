"""What every room stands on: errors, definitions, files, progress, and what is known of this machine.

Nothing here imports another room of the package, and nothing here needs torch.
"""
