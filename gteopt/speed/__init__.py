"""Speed and memory of encoders, measured side by side."""
