"""Names of the fp32 values that a run keeps beside each trained weight and the optimizer's moments. Pure."""

from __future__ import annotations

from engine.config.schema.adapter import AdaLoRAConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"
"""Moments of AdaLoRA: running means of the sensitivity of an element, and of its deviation from that mean."""


def kept_moments(config: RunConfig, run_stage: RunStage) -> tuple[str, ...]:
    """Return the names of the moments that a run stage adds, and of those that the model's adapter adds."""
    ranks = (IMPORTANCE, UNCERTAINTY) if isinstance(config.model.adapter, AdaLoRAConfig) else ()
    return (*run_stage.added_moments, *ranks)
