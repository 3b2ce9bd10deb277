"""ZeRO through DeepSpeed: one engine per pipeline stage, and everything that touches DeepSpeed's private parts."""

from engine.parallel.zero.engine import NotFinite, StageEngine, finite, start

__all__ = ["NotFinite", "StageEngine", "finite", "start"]
