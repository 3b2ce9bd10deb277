"""The sections of an update: the optimizer, the number formats, and the steps that never reach the weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section


class OptimizerConfig(Section):
    """Optimizer: AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of linear layers and AdamW for the rest
    (Jordan et al. 2024), with decay groups by name."""

    kind: ClassVar[KeyKind] = "schedule"
    kinds: ClassVar[dict[str, KeyKind]] = {"name": "meaning"}

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW, or Muon for the matrices of linear layers and AdamW for everything else."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of AdamW's first moment, per step."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of AdamW's second moment, per step."""
    epsilon: float = Field(default=1e-8, ge=1e-37)
    """Number added to the root of the second moment. A smaller one than 1e-37 is 0 in fp32, and makes a weight without
    a gradient NaN."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of Muon's momentum, per step."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, decoupled from the gradient: a step multiplies weights by 1 - learning rate x this."""
    no_decay: tuple[str, ...] = ("*.bias", "*norm*")
    """Name patterns (shell style) of parameters without weight decay."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 means no clipping."""


class PrecisionConfig(Section):
    """Number formats. Master weights and moments are always fp32."""

    kind: ClassVar[KeyKind] = "schedule"

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Number format of the working weights and of the activations."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are accumulated and reduced."""


class StabilityConfig(Section):
    """Reaction to a step whose loss or gradient is not finite, or far above those before it.

    A skipped step leaves weights and optimizer state as they are, bit for bit, and the data moves on.
    """

    kind: ClassVar[KeyKind] = "schedule"

    non_finite: Literal["stop", "skip"] = "stop"
    """Reaction to a step whose loss or gradient norm is not finite: end the run, or skip the step. It never reaches the
    weights."""
    max_skips: PositiveInt = 10
    """Number of steps that may be skipped in a row, for whatever reason; one more ends the run."""
    spike_sigma: PositiveFloat | None = None
    """Number of standard deviations above the mean of the last accepted steps from which on a step's loss or gradient
    norm is a spike, and the step is skipped. None means that no step is a spike."""
    window: int = Field(default=128, ge=2)
    """Number of accepted steps that mean and deviation are taken of; no step is a spike before there are as many."""
    rollback_spikes: PositiveInt | None = None
    """Number of spikes within `rollback_steps` steps after which the run goes back to its newest whole checkpoint and
    leaves out the samples from the first spike on. None means no rollback."""
    rollback_steps: PositiveInt = 10
    """Number of steps within which these spikes fall."""
    max_rollbacks: int = Field(default=3, ge=1, le=16)
    """Largest number of rollbacks of a run; one more ends it."""
