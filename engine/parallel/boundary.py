"""What crosses from one chunk of the model to the next: a named dict of tensors whose shapes and dtypes are fixed.

Fixed before the first step, so nothing is negotiated at run time. The names are the keywords of the next chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
"""Tensors by the keyword of the chunk that takes them, or by the name under which a chunk returns them."""


DOMAINS = "domains_B"
"""What a micro-batch's inputs call the numbers of its rows' domains (int64)."""
ROW_LOSSES = "row_losses_BL"
"""What a last chunk returns of its rows where it is asked `by_row`: their parts of `losses_L`, without gradients."""


@dataclass(frozen=True)
class Field:
    """One tensor of a boundary; a gradient comes back for it if `differentiable`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool
    evaluated: bool = True
    """Whether it travels in evaluation, too."""


Boundary = dict[str, Field]
"""What one chunk hands to the next, by the name of the next chunk's keyword."""


def differentiable(boundary: Boundary) -> list[str]:
    """The names for which gradients come back, in the boundary's order."""
    return [name for name, field in boundary.items() if field.differentiable]
