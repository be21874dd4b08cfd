"""The bundle's answers and speed against the original's, measured on the exported graph where it runs."""
