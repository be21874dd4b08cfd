"""A bundle is asked on other machines: one job is carried there, and its results are judged here."""
