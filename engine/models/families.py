"""The families of models, by `ModelConfig.family`: the one place that knows them all.

Legend: L losses of the objective.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from engine.config.schema.model import ModelConfig
from engine.models import bert, gpt, t5
from engine.models.chunk import Chunk, Rows
from engine.parallel.boundary import Boundary
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.sharding import ParameterSpec, Table


class Family(Protocol):
    """What the module of a family exports.

    A chunk's `forward` takes keywords alone and returns a dict of what it made: the boundary's tensors; from the last
    chunk `losses_L` (fp32, the weighted sum of each loss in the order of `losses`), or `logits_BTV` where it is given
    no targets. Tensors of a boundary that a chunk did not make are passed on as they came.
    """

    def build(self, config: ModelConfig, chunk: Chunk | None = None, functions: Functions = PLAIN) -> nn.Module:
        """The modules of one chunk (None: the whole model), on the device context that is active."""
        ...

    def sharding(self, config: ModelConfig) -> Table:
        """How the parameters of the whole model lie over the tensor axis; what is not named is replicated."""
        ...

    def specs(self, config: ModelConfig) -> list[ParameterSpec]:
        """Every parameter of the whole model by logical name, in the model's order; a tied one once."""
        ...

    def ties(self, config: ModelConfig) -> dict[str, str]:
        """Local name -> logical name of parameters that a chunk may hold under another name."""
        ...

    def losses(self, config: ModelConfig) -> tuple[str, ...]:
        """Names of the losses, each with a denominator of its own."""
        ...

    def wanted(self, config: ModelConfig, chunk: Chunk) -> frozenset[str]:
        """Keywords of the chunk that come from the data."""
        ...

    def boundary(self, config: ModelConfig, layer: int, rows: Rows) -> Boundary:
        """What the chunk that begins with the global `layer` (above 0) receives from the one before it."""
        ...


FAMILIES: dict[str, Family] = {"gpt": cast(Family, gpt), "bert": cast(Family, bert), "t5": cast(Family, t5)}


def family(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return FAMILIES[config.family]
