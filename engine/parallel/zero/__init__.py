"""ZeRO through DeepSpeed: one engine per pipeline stage, and everything that touches DeepSpeed's private parts."""

from engine.parallel.zero.adapter import start
from engine.parallel.zero.engine import NotFinite, StageEngine, accept_finite

__all__ = ["NotFinite", "StageEngine", "accept_finite", "start"]
