"""Preparation of text as folders of token shards: sources, parsing, encoding, duplicates, assembly."""
