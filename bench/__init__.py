"""Benchmarks, each run as `python -m bench.NAME`: `step` against transformers' Trainer, `gpu` on one GPU."""
