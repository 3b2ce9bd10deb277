"""The head over the vocabulary: the one module that owns the output projection, for logits and for the loss.

Legend: D width, V vocabulary (padded; local under tensor parallelism).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.parallel.functions import Functions


class VocabularyHead(nn.Module):
    """Projects hidden states on the vocabulary; with targets, straight to their loss, so that no logits are kept.

    `weight` is (padded_vocab_size, width); its rows from `vocab_size` on, and those of the bias, never matter.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, width: int, vocab_size: int, padded_vocab_size: int, functions: Functions, bias: bool = False
    ) -> None:
        super().__init__()
        self.vocab_size, self.functions = vocab_size, functions
        self.weight = nn.Parameter(torch.zeros(padded_vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(padded_vocab_size)) if bias else None

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The fp32 weighted sum of the tokens' losses, or logits (..., vocab_size) where `targets` is None.

        `hidden` is (..., D); `targets` (int64) and `weights` have its shape without D. Logits are whole on one
        tensor-parallel rank only. `into` is filled with the tokens' weighted losses.
        """
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)[..., : self.vocab_size]
        assert weights is not None, "targets come with weights"
        given = (hidden, self.weight, self.bias, targets, weights, self.vocab_size)
        return self.functions.linear_cross_entropy(*given, **({} if into is None else {"into": into}))

    def losses(
        self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, by_row: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sum as `forward` returns it, and where asked for its part of each row, (B,) without a gradient."""
        if not by_row:
            return self(hidden, targets, weights), None
        into = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        return self(hidden, targets, weights, into), into.flatten(1).sum(1)
