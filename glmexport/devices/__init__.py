"""A bundle asked on other machines: one job, whatever carries it there, and its results judged here."""
