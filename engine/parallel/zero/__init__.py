"""ZeRO through DeepSpeed: one engine per pipeline stage, and everything that touches DeepSpeed's private parts."""

from engine.parallel.zero.engine import StageEngine, start

__all__ = ["StageEngine", "start"]
