"""Everything after the model: shorten an embedding, code it, search the codes.

Refuses to know: torch, models, files.
"""
