"""A model that ours computes, in a source: configuration, mapping, weights, and moments where the source has them.

Everything that converts, compares or starts from weights takes one of these, whatever the format behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from engine.checkpoint.interchange.mapping import ModelMap, own_names
from engine.checkpoint.interchange.sources import Source, check_source, read_parameter
from engine.checkpoint.manifest import WEIGHT
from engine.config.schema.model import ModelConfig

CONVERTED = "converted"
"""Section of a checkpoint that no run saved: what it was made from."""


@dataclass(frozen=True, kw_only=True)
class SourceWeights:
    """Places of the parameters of a model of ours in a source."""

    map: ModelMap
    source: Source
    unused: tuple[str, ...] = ()
    """Patterns of tensors in the source that mean nothing."""
    moments: Mapping[str, Source] = field(default_factory=dict)
    """Sources of the moments that the source holds, by the names that `torch.optim` gives them; tensors are named and
    shaped as the weights are."""
    step: int | None = None
    """Optimizer steps that the moments have seen; None where the source does not say it."""
    kind: str = "a Hugging Face folder"
    """Format of the source in words."""
    described_by: str = "its config.json"
    """Description of the tensors that the source has to have, in words for messages."""

    def check(self) -> Self:
        """Return this, where the source has exactly the model's tensors. Raises `ConfigError` where it has not."""
        check_source(self.source, self.map, self.unused, self.described_by)
        return self

    def read(self, name: str, first: int = 0, end: int | None = None, state: str = WEIGHT) -> torch.Tensor:
        """Return rows of one of our parameters, or of a moment of it, fp32.

        Raises:
            ConfigError: a value is not finite.
        """
        source = self.source if state == WEIGHT else self.moments[state]
        return read_parameter(source, self.map.parameters[name], first, end)

    @property
    def own_map(self) -> ModelMap:
        """Map of a format that has our own names."""
        return own_names({name: one.shape for name, one in self.map.parameters.items()})

    def moments_of(self, name: str) -> tuple[str, ...]:
        """Return the moments that the source holds of a parameter."""
        tensors = self.map.parameters[name].tensors
        return tuple(moment for moment, source in self.moments.items() if tensors.keys() <= source.shapes.keys())

    @property
    def bytes_read(self) -> int:
        """Bytes that were read so far, of weights and moments."""
        return self.source.bytes_read + sum(source.bytes_read for source in self.moments.values())


@dataclass(frozen=True, kw_only=True)
class SourceModel(SourceWeights):
    """Parameters of a model in a source, with its configuration."""

    model: ModelConfig
