"""Which consecutive part of a model one pipeline stage holds, and the rows that pass through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunk:
    """`layers` by global index, with the embedding if `first`, and the final norm and the head if `last`."""

    layers: range
    first: bool
    last: bool


def whole(num_layers: int) -> Chunk:
    """The chunk that is the whole model."""
    return Chunk(range(num_layers), first=True, last=True)


@dataclass(frozen=True)
class Rows:
    """The shape of a micro-batch: what the tensors of a boundary are sized by.

    `length` counts the tokens of a row (of the encoder, where there is one), `decoder_length` those of the decoder.
    `dtype` is that of activations; `segments`: rows hold several documents, whose numbers travel along.
    """

    num_rows: int
    length: int
    dtype: torch.dtype
    segments: bool
    decoder_length: int = 0
    shared_by: int = 1
    """Ranks that share the time of a row's hidden states; document numbers travel whole."""
