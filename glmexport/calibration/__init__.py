"""What to calibrate on: text by language and split, packed sequences, and the Hessian of every tap."""
