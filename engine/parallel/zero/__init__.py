"""ZeRO through DeepSpeed: one engine per pipeline stage, and everything that touches DeepSpeed's private parts."""

from engine.parallel.zero.adapter import start
from engine.parallel.zero.engine import StageEngine
from engine.parallel.zero.step import NotFinite, StepResult, accept_finite

__all__ = ["NotFinite", "StageEngine", "StepResult", "accept_finite", "start"]
