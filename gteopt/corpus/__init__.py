"""Many texts to vectors: shards, the cache, and workers that encode."""
