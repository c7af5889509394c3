"""Describes a model folder without loading its weights.

Refuses to know: torch. Code that a folder names is never imported; pickles are never opened.
"""
