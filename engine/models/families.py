"""The families of models, by `ModelConfig.family`: the one place that knows them all."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from engine.config.schema.model import ModelConfig
from engine.models import bert, gpt, t5
from engine.models.heads import Head
from engine.parallel.boundary import Boundary, MicroBatchShape
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import ParameterSpec, Table
from engine.plan.cut import ModelChunk


class Family(Protocol):
    """Functions that the module of a family exports. `head` None means the one of the configuration.

    A chunk's `forward` takes keywords alone and returns tensors by name: those of the boundary behind it, from the last
    chunk those of its head. Tensors of a boundary that a chunk does not return are passed on unchanged.
    """

    def build(
        self,
        config: ModelConfig,
        chunk: ModelChunk | None = None,
        functions: Functions = PLAIN,
        head: Head | None = None,
    ) -> nn.Module:
        """Build the modules of one chunk (None means the whole model), on the device context that is active."""
        ...

    def configured_head(self, config: ModelConfig) -> Head:
        """Return the head of a configuration: that of its task, or that over the vocabulary of pretraining."""
        ...

    def sharding(self, config: ModelConfig, head: Head | None = None) -> Table:
        """Return how the parameters of the whole model are split over the tensor axis; the others are replicated."""
        ...

    def specs(self, config: ModelConfig, head: Head | None = None) -> list[ParameterSpec]:
        """Describe every parameter of the whole model by logical name, in the model's order; a tied one once."""
        ...

    def ties(self, config: ModelConfig) -> dict[str, str]:
        """Return local name -> logical name of parameters that a chunk may hold under another name."""
        ...

    def inputs(self, config: ModelConfig, chunk: ModelChunk, head: Head | None = None) -> frozenset[str]:
        """Return the keywords of the chunk that come from the data."""
        ...

    def boundary(self, config: ModelConfig, layer: int, rows: MicroBatchShape) -> Boundary:
        """Return the tensors that the chunk which begins with the global `layer` (above 0) receives."""
        ...


FAMILIES: dict[str, Family] = {"gpt": cast(Family, gpt), "bert": cast(Family, bert), "t5": cast(Family, t5)}


def family(config: ModelConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.family]
