"""An OpenAI-compatible embeddings server over encoders.

`app` is the HTTP side, `engine` the one thread that owns the device, `batching` decides what runs
together and who goes first, `schema` is the wire format.
"""
