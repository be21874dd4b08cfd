"""Declarations of what a checkpoint's model consists of: one a family, without numbers."""
