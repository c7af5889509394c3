"""Turn many texts into vectors: shards, the vector cache, workers, and whole corpora."""
