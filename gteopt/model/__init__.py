"""A model folder, described without its weights.

Refuses to know: torch. Code that a folder names is never imported; pickles are never opened.
"""
