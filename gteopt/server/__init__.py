"""Serve embeddings over an API that is compatible with OpenAI's.

`app` has the routes, and `schema` the wire format. `engine` is the one thread that uses the device.
`batching` decides which texts run together and in which order.
"""
