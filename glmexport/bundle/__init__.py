"""The deliverable: a directory with a manifest of every file in it, and the settings of its loop."""
