"""An OpenAI-compatible embeddings server over encoders.

`app` is the HTTP side, and `schema` the wire format. `engine` is the one thread that owns the
device. `batching` decides what runs together and who goes first.
"""
