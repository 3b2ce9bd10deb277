"""Text to folders of token shards: sources, parsing, encoding, duplicates, assembly."""
