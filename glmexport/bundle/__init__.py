"""The deliverable: a directory with a manifest of every file in it, and what its loop has to know."""
