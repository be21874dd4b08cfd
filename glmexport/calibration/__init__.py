"""Calibration data: text by language and split, packed sequences, and the Hessian of every tap."""
