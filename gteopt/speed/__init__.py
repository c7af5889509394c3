"""Measure speed and memory of encoders side by side."""
