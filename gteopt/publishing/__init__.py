"""Artifacts to and from the model hub."""
