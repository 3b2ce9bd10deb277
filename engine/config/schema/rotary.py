"""Scaling of rotary positions beyond the length that a model was first trained with, and what a layer rotates.

A `rope_scaling` section is one of these classes, told apart by its key `type`; `engine.models.rotary` has the formulas.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt

from engine.config.schema.section import Section

ScalingType = Literal["linear", "dynamic", "llama3", "yarn"]


class RopeScaling(Section):
    """The keys that every kind of scaling has."""

    told_apart_by: ClassVar[str] = "type"

    type: ScalingType
    """Kind of scaling."""
    factor: float = Field(ge=1.0)
    """Factor by which the length grows."""


class LinearScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): all frequencies divided by the factor."""

    type: Literal["linear"]
    """Kind of scaling: position interpolation."""


class DynamicScaling(RopeScaling):
    """Dynamic NTK-aware scaling: a larger base in rows of more than `model.max_positions` tokens, by their length.

    Rows may have `factor` x `model.max_positions` tokens.
    """

    type: Literal["dynamic"]
    """Kind of scaling: a base that depends on the row's length."""


class Llama3Scaling(RopeScaling):
    """Scaling of Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783): low frequencies are divided by the factor, high
    ones are kept, those between are interpolated."""

    type: Literal["llama3"]
    """Kind of scaling: by wavelength, as in Llama 3.1."""
    low_freq_factor: PositiveFloat = 1.0
    """Number of turns within `original_max_positions` up to which a frequency counts as low."""
    high_freq_factor: PositiveFloat = 4.0
    """Number of turns within `original_max_positions` from which on a frequency counts as high."""
    original_max_positions: PositiveInt
    """Number of tokens in a row of the first training."""


class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a ramp from kept to divided frequencies, and larger rotated values."""

    type: Literal["yarn"]
    """Kind of scaling: YaRN."""
    original_max_positions: PositiveInt
    """Number of tokens in a row of the first training."""
    attention_factor: PositiveFloat | None = None
    """Factor of the rotated queries and keys. None means 0.1 ln(`factor`) + 1."""
    beta_fast: PositiveFloat = 32.0
    """Number of turns within `original_max_positions` from which on a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Number of turns within `original_max_positions` up to which a frequency is divided by the factor."""
    truncate: bool = True
    """Bounds of the ramp rounded to whole dimensions."""


AnyRopeScaling = Annotated[LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling, Discriminator("type")]
"""A `rope_scaling` section of any kind."""


class Rotary(NamedTuple):
    """Rotation of the queries and keys of a layer."""

    theta: float
    """Base of the frequencies."""
    width: int
    """Number of dimensions of a head that are rotated, the first ones."""
    max_positions: int
    """Number of tokens of a row from which on dynamic scaling begins."""
    scaling: RopeScaling | None = None
