"""Releases on servers: sent, verified there, switched to, and taken back where they do not answer as they should."""
