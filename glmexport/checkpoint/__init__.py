"""A checkpoint's files, checked before they are mapped, and read one tensor at a time."""
