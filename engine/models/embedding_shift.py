"""Steps away from the embeddings of a batch's tokens, for adversarial training (`engine.train.adversarial`)."""

from __future__ import annotations

import torch

SHIFT = "embedding_shift_BTD"
"""Keyword of the first chunk: what is added to the embeddings of the tokens that this rank holds."""


def shifted(hidden_BTD: torch.Tensor, shift_BTD: torch.Tensor | None) -> torch.Tensor:
    """Return embeddings with a shift, where there is one."""
    return hidden_BTD if shift_BTD is None else hidden_BTD + shift_BTD
