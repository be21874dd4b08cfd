"""Releases: a bundle is signed with what is known of it, verified where it arrives, packed and carried."""
