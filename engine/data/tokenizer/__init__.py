"""Tokenizers: trained, taken over, and what objectives must know of their tokens."""
