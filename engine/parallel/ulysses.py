"""Attention over rows that the ranks of the sequence axis share (Jacobs et al. 2023, DeepSpeed-Ulysses).

Each rank computes queries, keys and values of its slice of the sequence for all heads that it has. One exchange gives
it the whole row for some of these heads, where attention is as usual, and another returns the results of its slice for
all of them.

Legend: B batch, T time, H heads, G key/value heads, K head size. Outside of the exchanges T is a slice and H and G are
all heads of the rank; between them T is the row and H and G are a part of these heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from engine.parallel.collectives import all_to_all, gather_along, reduce_scatter_along
from engine.parallel.functions import Drop, Mask, attention
from engine.parallel.groups import Group

TIME, HEADS = 1, 2
"""Sequence dimension and dimension of heads in (B, T, H, K)."""


class _Exchange(torch.autograd.Function):
    """All-to-all that cuts one dim and joins another over the group; the gradient takes the opposite exchange."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, cut: int, join: int) -> torch.Tensor:
        ctx.group, ctx.dims = group, (join, cut)
        return all_to_all(x, group, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return all_to_all(grads[0], ctx.group, *ctx.dims), None, None, None


class _WholeSequence(torch.autograd.Function):
    """Gather of the slices forward; backward each rank gets the sum of all ranks' gradients of its slice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return gather_along(x, group, TIME)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return reduce_scatter_along(grads[0].contiguous(), ctx.group, TIME), None


def whole_sequence(x_BTC: torch.Tensor, group: Group) -> torch.Tensor:
    """Return (B, T, C) of whole rows from every rank's slice. Collective over `group`, both ways."""
    return _WholeSequence.apply(x_BTC, group)  # type: ignore[no-any-return]


def sequence_attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    mask: Mask | None,
    scale: float | None = None,
    drop: Drop | None = None,
    *,
    group: Group,
) -> torch.Tensor:
    """Compute `attention` of this rank's slice, out_BTHK. Collective over `group`.

    `mask` is of whole rows: a `Band`, (B, 1, T, T), or with a number for each head that attention works on here
    (`SequenceSlice.own`). Keys may be of other rows than queries (cross-attention), cut into slices, too. The group's
    size divides G, so that a query head meets its key/value head on one rank.
    """
    if drop is not None:
        # Dropout is numbered by global heads: this rank's part begins at its share of the given heads.
        drop = partial(drop, first_head=group.position * (q_BTHK.size(HEADS) // group.size))
    # (B, T / n, H, K) -> (B, T, H / n, K): with n = 2 and 4 heads, rank 0 gets heads 0 and 1 of the whole row, rank 1
    # heads 2 and 3. Attention needs all positions of a head, and no two heads need each other.
    rows = [_Exchange.apply(x, group, HEADS, TIME) for x in (q_BTHK, k_BTGK, v_BTGK)]
    # (B, T, H / n, K) -> (B, T / n, H, K): the exchange with both dims swapped is its own inverse.
    return _Exchange.apply(attention(*rows, mask, scale, drop), group, TIME, HEADS)  # type: ignore[no-any-return]
