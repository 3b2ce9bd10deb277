"""The head of a task with the head over the vocabulary beside it, which predicts the tokens of replayed text.

Both see the same hidden states, and the loss is the sum of theirs: rows of one kind weigh 0 for the other. Modules of
one name are one module, as in the models that both heads come from: ModernBERT's transformation, for example.

Legend: B batch, T tokens of a row, D width, L losses (one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.config.objectives import REPLAYED
from engine.models.dropout import Dropout
from engine.models.heads import Head
from engine.parallel.boundary import ROW_LOSSES, Tensors
from engine.parallel.functions import Functions
from engine.parallel.sharding import Table

LOSSES = "losses_L"


@dataclass(frozen=True)
class HeadWithVocabulary:
    """Predicts what a task asks for, and tokens of replayed text."""

    task: Head
    vocabulary: Head
    """Head over the vocabulary, with one loss."""

    @property
    def losses(self) -> tuple[str, ...]:
        """The one loss, named as the task; text that is replayed is told apart by the source of its rows."""
        return self.task.losses

    @property
    def inputs(self) -> frozenset[str]:
        """Keywords of the task's head, and those of the head over the vocabulary behind `replay_`."""
        return self.task.inputs | {REPLAYED + name for name in self.vocabulary.inputs}

    @property
    def sharding(self) -> Table:
        """Sharding of the parameters of both."""
        return {**self.vocabulary.sharding, **self.task.sharding}

    def modules(self, functions: Functions) -> dict[str, nn.Module]:
        """Make the modules of both."""
        return self.vocabulary.modules(functions) | self.task.modules(functions)

    def outputs(
        self, chunk: nn.Module, hidden_BTD: torch.Tensor, given: Tensors, by_row: bool, dropout: Dropout | None = None
    ) -> Tensors:
        """Compute `losses_L` (L = 1) over the targets of both kinds; without any, what the task's head predicts."""
        replayed = {name.removeprefix(REPLAYED): one for name, one in given.items() if name.startswith(REPLAYED)}
        own = {name: one for name, one in given.items() if not name.startswith(REPLAYED)}
        outputs = self.task.outputs(chunk, hidden_BTD, own, by_row, dropout)
        if not replayed and LOSSES not in outputs:
            return outputs
        # An evaluation has rows of one kind; the other head runs all the same, since its weights may have to be
        # gathered at the same point on every rank.
        kept_BTD = hidden_BTD if replayed else hidden_BTD[:, :1]
        kept = self.vocabulary.outputs(chunk, kept_BTD, replayed, by_row)
        both = [found for found in (outputs, kept) if LOSSES in found]
        summed = {LOSSES: torch.stack([found[LOSSES] for found in both]).sum(0)}
        if by_row:
            summed[ROW_LOSSES] = torch.stack([found[ROW_LOSSES] for found in both]).sum(0)
        return (outputs if LOSSES in outputs else {}) | summed
