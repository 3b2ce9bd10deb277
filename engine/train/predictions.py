"""Logits that a task's head computes for validation rows, gathered from the ranks that hold the last pipeline stage.

Each row is counted once, whatever the layout: padding rows are left out, and rows stand in the order of their data set.

Legend: B batch, T tokens of a row (local where ranks share them), C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.data.validation import ValidationSamples
from engine.parallel.collectives import all_reduce, gather_along, gather_objects
from engine.parallel.groups import Groups

Measure = Callable[[RunStage, TokenDataset, list[np.ndarray]], Mapping[str, float]]
"""Measures of a run stage's task by name, from the logits of each row of a data set: (C,), or (T, C), fp32."""


class RowLogits:
    """Logits of one pass over validation samples, on one rank."""

    def __init__(self, samples: ValidationSamples, groups: Groups, micro_batch_size: int) -> None:
        self._groups = groups
        ranks = (groups.coordinates.data_rank, groups.layout.data, micro_batch_size)
        self._numbers = samples.numbers(*ranks) if groups.is_last_stage else []
        self._num_samples, self._num_batches = samples.num_samples, 0
        self._rows: dict[int, np.ndarray] = {}

    def add(self, logits: list[torch.Tensor]) -> None:
        """Take the logits of the next micro-batches, (B, C) or (B, T, C): none on other pipeline stages. Collective
        over groups.sequence."""
        sequence = self._groups.sequence
        for found in logits:
            found = gather_along(found, sequence, dim=1) if found.dim() == 3 else all_reduce(found, sequence)
            numbers = self._numbers[self._num_batches].tolist()
            self._num_batches += 1
            # rows behind those of the samples are padding
            self._rows |= zip(numbers, found[: len(numbers)].float().cpu().numpy(), strict=True)

    def gathered(self) -> list[np.ndarray]:
        """Return the logits of all rows in the order of their data set. Collective over the world."""
        groups = self._groups
        is_copy = groups.tensor.position > 0 or groups.sequence.position > 0
        rows: dict[int, np.ndarray] = {}
        for found in gather_objects({} if is_copy else self._rows, groups.world):
            rows |= found
        assert len(rows) == self._num_samples, f"{len(rows)} of {self._num_samples} rows have logits"
        return [rows[number] for number in range(len(rows))]
