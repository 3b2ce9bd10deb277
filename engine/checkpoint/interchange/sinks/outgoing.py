"""Weights on their way into the format of a training library: their source, their names there, and what goes along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.checkpoint.interchange.convert import Progress, no_progress
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.source_model import SourceWeights


@dataclass(frozen=True)
class Outgoing:
    """Weights of an open source, and the names that they get."""

    opened: SourceWeights
    target: ModelMap
    """Names and shapes of the tensors that are written."""
    with_moments: bool = False
    """True carries the optimizer's moments, in formats that can do without them."""
    progress: Progress = no_progress

    def tensors(self, name: str, state: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that one state of a parameter of ours becomes, as views of it where they can be.

        Raises:
            ConfigError, CheckpointError: the source cannot be read, or a value is not finite.
        """
        values = self.opened.read(name, state=state)
        yield from self.target.parts(name, values)
        self.progress(values.nbytes)


def own_memory(values: torch.Tensor) -> torch.Tensor:
    """Return values row-major, in memory of their own: `torch.save` writes strides, and the storage under a view."""
    is_own = values.untyped_storage().nbytes() == values.nbytes and values.is_contiguous()
    return values if is_own else values.clone(memory_format=torch.contiguous_format)
