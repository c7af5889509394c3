"""Build an artifact from a recipe and a base model, block by block."""
