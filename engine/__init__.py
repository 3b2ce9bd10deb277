"""Palimpsest: pretraining of language models through DeepSpeed, in any layout, with exact restarts."""

__version__ = "0.1.0"
