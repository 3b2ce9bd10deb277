"""Sinks of weights: files whose headers are planned from names and shapes before the first byte is written."""
