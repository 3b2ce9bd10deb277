"""Tensors that cross from one chunk of the model to the next: a named dict with fixed shapes and dtypes.

They are fixed before the first step, so that a receiver allocates without asking. Names are keywords of the next chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
"""Tensors by the keyword of the chunk that takes them, or by the name under which a chunk returns them."""


DOMAINS = "domains_B"
"""Name of the domain numbers (int64) of a micro-batch's rows, among its inputs."""
ROW_LOSSES = "row_losses_BL"
"""Name of the rows' shares of `losses_L`, without gradients, that a last chunk returns if called with `by_row`."""

LOGITS = "logits"
"""Name of the logits, (B, C) or (B, T, C), that a last chunk with a task's head returns beside its losses in
evaluation."""


@dataclass(frozen=True)
class MicroBatchShape:
    """Sizes of a micro-batch, from which the shapes of a boundary's tensors follow."""

    num_rows: int
    length: int
    """Tokens of a row (of the encoder, where there is one)."""
    dtype: torch.dtype
    """Dtype of activations."""
    segments: bool
    """True if rows hold several documents, whose numbers travel along."""
    decoder_length: int = 0
    """Tokens of a decoder's row."""
    shared_by: int = 1
    """Number of ranks that share the sequence dimension of a row's hidden states; document numbers travel whole."""


@dataclass(frozen=True)
class Field:
    """One tensor of a boundary; a gradient comes back for it if `differentiable`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool
    evaluated: bool = True
    """True if it is sent in evaluation, too."""


Boundary = dict[str, Field]
"""Fields that one chunk hands to the next, by the keyword of the next chunk."""


def differentiable(boundary: Boundary) -> list[str]:
    """Return the names for which gradients come back, in the boundary's order."""
    # Both sides of a boundary send and receive in this order: messages carry no names.
    return [name for name, field in boundary.items() if field.differentiable]
