"""Dropout whose masks depend on (seed, step, sample, global layer, site, element) alone.

The data gives every row a key, made of seed, step and the sample's address. That key, the layer and the site give two
32-bit keys, and these with the number of an element in the row (position and feature; head, query and key) give the
element's own bits: a counter-based generator (Salmon et al. 2011) with the finalizer of MurmurHash3 (Appleby 2011) in
two rounds. All of it is integer arithmetic, equal on every device, so neither the layout, the micro-batch nor a second
run of a layer changes a mask. A rank that holds a part of a row passes the beginning of that part.

Legend: B batch, T time, D width, H heads (local), Q queries, S keys (of attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from engine.config.adapter_targets import Target
from engine.config.schema.model import LARGEST_DEPTH, ModelConfig
from engine.parallel.functions import PLAIN, Drop, Functions

KEYS = "dropout_keys_B"
"""The keyword of a batch's keys, int64; absent where nothing is dropped, as in evaluation."""
EMBEDDING_OUTPUT, ATTENTION, ATTENTION_OUTPUT, FFN_OUTPUT = range(4)
"""Sites: hidden states of the embedding; probabilities; outputs of attention and of the feed-forward part."""
CROSS_ATTENTION, CROSS_ATTENTION_OUTPUT, FFN_INNER, STACK_OUTPUT = range(4, 8)
"""Sites of T5 alone: probabilities and output of the attention to the encoder; inner features of the feed-forward part;
output of a stack's last norm."""
NUM_SITES = 8
"""Number of sites per layer, a stride of the numbers below: to raise it would change the masks of every run."""
ADAPTER_LAYERS = 4
"""Numbers of layers that the sites of a layer's adapters take, counted on from twice the largest number of a layer."""


@dataclass(frozen=True)
class Dropout:
    """Dropout in the rows of one micro-batch.

    `first_position` is the position of this rank's first hidden state, `first_given` that of the first token that its
    layers are given (`engine.parallel.functions.SequenceSlice`).
    """

    config: ModelConfig
    keys_B: torch.Tensor
    first_position: int = 0
    first_given: int = 0
    tensor_rank: int = 0

    def hidden(self, x_BTD: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        """Drop elements of hidden states (all features of some positions); `layer` is the global number."""
        if self.config.dropout == 0:
            return x_BTD
        num_positions, width = x_BTD.shape[1:]
        element_numbers = _element_numbers((num_positions, width), (self.first_position, 0), (0, width), x_BTD.device)
        return _drop(x_BTD, element_numbers, self.config.dropout, self.keys_B, layer, site)

    def inner(self, x_BTF: torch.Tensor, layer: int) -> torch.Tensor:
        """Drop elements of a layer's inner feed-forward features, in T5 alone (Raffel et al. 2020, section 2.1).

        A rank drops its own features of the positions that it is given.
        """
        if self.config.family != "t5" or self.config.dropout == 0:
            return x_BTF
        # Positions from `first_given`, not `first_position`: inside of the feed-forward part tensor ranks hold all of
        # the given positions and split the features.
        shape = x_BTF.shape[1:]
        firsts = (self.first_given, self.tensor_rank * shape[1])
        element_numbers = _element_numbers(shape, firsts, (0, self.config.feed_forward_size), x_BTF.device)
        return _drop(x_BTF, element_numbers, self.config.dropout, self.keys_B, layer, FFN_INNER)

    def adapter_input(self, x_BTI: torch.Tensor, layer: int, target: Target) -> torch.Tensor:
        """Drop elements of what the adapter of a matrix reads: whole features of the positions that the rank holds, or
        before a row-parallel layer its own features of the positions that it is given."""
        rate = 0.0 if self.config.adapter is None else self.config.adapter.drop_rate
        if rate == 0:
            return x_BTI
        num_positions, width = x_BTI.shape[1:]
        firsts = (self.first_given, self.tensor_rank * width) if target.is_row else (self.first_position, 0)
        element_numbers = _element_numbers((num_positions, width), firsts, (0, target.columns), x_BTI.device)
        more, site = divmod(target.site, NUM_SITES)
        number = 2 * LARGEST_DEPTH + layer * ADAPTER_LAYERS + more
        return _drop(x_BTI, element_numbers, rate, self.keys_B, number, site)

    def probabilities(self, layer: int, first_head: int, site: int = ATTENTION) -> Drop | None:
        """Return the dropout of probabilities of a layer's heads from the global `first_head` on; None without."""
        if self.config.attention_dropout == 0:
            return None
        return partial(self._probabilities, layer, site, first_head)

    def _probabilities(
        self, layer: int, site: int, called_with: int, probabilities_BHQS: torch.Tensor, first_head: int = 0
    ) -> torch.Tensor:
        """Drop elements of probabilities_BHQS; `called_with` and `first_head` add up to the global number of the first.

        Elements are numbered in rows of `max_positions`, not of their own length, which a layout may fill up.
        """
        sizes = (0, self.config.max_positions, self.config.max_positions)
        element_numbers = _element_numbers(
            probabilities_BHQS.shape[1:], (called_with + first_head, 0, 0), sizes, probabilities_BHQS.device
        )
        return _drop(probabilities_BHQS, element_numbers, self.config.attention_dropout, self.keys_B, layer, site)


def drops(config: ModelConfig) -> bool:
    """Return True if a model in training drops anything."""
    adapter = 0.0 if config.adapter is None else config.adapter.drop_rate
    return config.dropout > 0 or config.attention_dropout > 0 or adapter > 0


def make(
    config: ModelConfig, keys_B: torch.Tensor | None, x_BTD: torch.Tensor, functions: Functions = PLAIN
) -> Dropout | None:
    """Make the dropout of a micro-batch with these keys and hidden states; None without keys."""
    if keys_B is None:
        return None
    first_given = functions.sequence_slice.first(functions.sequence_slice.given(x_BTD))
    return Dropout(config, keys_B, functions.first_held(x_BTD), first_given, functions.tensor_rank)


def _element_numbers(
    shape: tuple[int, ...], firsts: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Number the elements (int32) of the part of `shape` that begins at `firsts` in a row of `sizes`, row-major.

    The first of the `sizes` is not used. Numbers wrap around beyond 2^32 elements: such masks repeat.
    """
    # Of rows 4 features wide, the part that begins at (2, 1) with shape (2, 3) has the numbers
    # [[9, 10, 11], [13, 14, 15]]: position x 4 + feature, wherever the part is computed.
    element_numbers = torch.zeros((), dtype=torch.int32, device=device)
    for dim, (length, first, size) in enumerate(zip(shape, firsts, sizes, strict=True)):
        indices = torch.arange(first, first + length, dtype=torch.int32, device=device)
        element_numbers = (element_numbers * size if dim else element_numbers).unsqueeze(-1) + indices
    return element_numbers


def _drop(
    x: torch.Tensor, element_numbers: torch.Tensor, rate: float, keys_B: torch.Tensor, layer: int, site: int
) -> torch.Tensor:
    """Set elements of `x` (B, *element_numbers.shape) to 0 at this rate, and scale the others to keep the mean."""
    # layer + 1: the embedding is layer -1.
    low_B, high_B = (
        key_B.view(-1, *[1] * element_numbers.dim()) for key_B in _site_keys(keys_B, (layer + 1) * NUM_SITES + site)
    )
    # (B, *element_numbers.shape) by broadcasting. 31 bits are compared, since torch compares int32 as signed numbers.
    bits = mix32(mix32(element_numbers ^ low_B) ^ high_B)
    dropped = (bits & 0x7FFFFFFF) < int(rate * 2**31)
    return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - rate))


def _site_keys(keys_B: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two int32 keys of each row for a layer's site: both halves of SplitMix64 (Steele et al. 2014)."""
    # 0x9E37... is 2^64 divided by the golden ratio, the step of that generator; the rest is its finalizer.
    z = keys_B + _signed(number * 0x9E3779B97F4A7C15, 64)
    z = (z ^ _shift(z, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    z = (z ^ _shift(z, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    z = z ^ _shift(z, 31, 64)
    return tuple(_to_int32(half) for half in (z, z >> 32))  # type: ignore[return-value]


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Apply the finalizer of MurmurHash3 to int32, a permutation; multiplications wrap around."""
    x = (x ^ _shift(x, 16, 32)) * _signed(0x85EBCA6B, 32)
    x = (x ^ _shift(x, 13, 32)) * _signed(0xC2B2AE35, 32)
    return x ^ _shift(x, 16, 32)


def _shift(x: torch.Tensor, count: int, num_bits: int) -> torch.Tensor:
    """Shift to the right with zeros coming in: torch shifts signed numbers with their sign."""
    return (x >> count) & ((1 << (num_bits - count)) - 1)


def _signed(number: int, num_bits: int) -> int:
    """Return the signed number with the same lowest bits: torch computes with signed numbers, below 2^63."""
    number &= (1 << num_bits) - 1
    return number - (1 << num_bits) if number >> (num_bits - 1) else number


def _to_int32(x: torch.Tensor) -> torch.Tensor:
    """Return the lowest 32 bits of int64 as int32, in range before the cast: beyond it casts differ between devices."""
    # Flipping bit 31 and subtracting 2^31 extends the sign: 0xFFFFFFFF -> 0x7FFFFFFF -> -1.
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
