"""Experiments in continual learning through the engine itself: `python -m bench.continual`."""
