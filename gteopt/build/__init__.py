"""A recipe and a base model to an artifact, block by block."""
