"""Judging of generated text: pure functions, which know nothing of how it was generated."""
