"""Judge an encoder: task scores through mteb, and fidelity to the baseline without labels.

Only this package imports mteb. Refuses to know: how a variant was made.
"""
