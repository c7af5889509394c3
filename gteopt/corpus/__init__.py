"""Many texts to vectors: shards, the cache, workers that encode, and whole corpora."""
