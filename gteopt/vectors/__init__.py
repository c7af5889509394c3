"""What happens to an embedding after the model: shorten it, code it, search the codes.

Refuses to know: torch, models, files.
"""
