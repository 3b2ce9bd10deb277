"""The sections of an update: the optimizer, the number formats, and the steps that never reach the weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from engine.config.schema.section import Kind, Section


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of linear layers and AdamW for the rest (Jordan et
    al. 2024), with decay groups by name."""

    kind: ClassVar[Kind] = "schedule"
    kinds: ClassVar[dict[str, Kind]] = {"name": "meaning"}

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    epsilon: float = Field(default=1e-8, ge=1e-37)
    """Added to the root of the second moment. A smaller one is 0 in fp32, and a weight without a gradient NaN."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Muon's (the betas are AdamW's)."""
    weight_decay: NonNegativeFloat = 0.1
    no_decay: tuple[str, ...] = ("*.bias", "*norm*")
    """Name patterns (shell style) of parameters without weight decay."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 means no clipping."""


class PrecisionConfig(Section):
    """Number formats. Master weights and moments are always fp32."""

    kind: ClassVar[Kind] = "schedule"

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the working weights and activations."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are accumulated and reduced."""


class StabilityConfig(Section):
    """What happens when a step's loss or gradient is not finite, or far above those before it.

    A skipped step leaves weights and optimizer state as they are, bit for bit, and the data moves on.
    """

    kind: ClassVar[Kind] = "schedule"

    non_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient norm is not finite; it never reaches the weights."""
    max_skips: PositiveInt = 10
    """Steps skipped in a row, for whatever reason, that are borne; one more ends the run."""
    spike_sigma: PositiveFloat | None = None
    """Skip a step whose loss or gradient norm is more than so many standard deviations above the mean of the last
    accepted steps; None: never."""
    window: int = Field(default=128, ge=2)
    """Accepted steps that mean and deviation are taken of; no step is a spike before there are so many."""
    rollback_spikes: PositiveInt | None = None
    """Spikes within `rollback_steps` steps after which the run goes back to its newest whole checkpoint and leaves out
    the samples from the first of them on; None: never."""
    rollback_steps: PositiveInt = 10
    """Steps within which these spikes fall."""
    max_rollbacks: int = Field(default=3, ge=1, le=16)
    """Rollbacks of a run; one more ends it."""
