"""Token shards: written, indexed, fetched, cached, and opened as verified memory maps."""
