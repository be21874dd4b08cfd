"""The engine that runs a bundle: sessions, caches, sequences, sampling and speculation.

Serving, validation, tuning and devices all run this one.
"""
