"""Judge an encoder: score tasks with mteb, and measure fidelity to the baseline without labels.

Only this package imports mteb. Refuses to know: how a variant was made.
"""
