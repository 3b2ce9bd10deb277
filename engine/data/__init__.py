"""Text to batches: tokenizers, token shards that are always verified, and sample order as a pure function."""
