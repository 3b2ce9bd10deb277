"""Attention over rows whose time is shared by the ranks of the sequence axis (Jacobs et al. 2023, DeepSpeed-Ulysses).

Each rank makes queries, keys and values of its stretch for all heads that it has. One exchange gives it the whole row
for some of these heads, where attention is as ever, and another gives it the results of its stretch for all of them.

Legend: B batch, T time, H heads, G key/value heads, K head size; T is a stretch outside and the row inside, H and G
are a part inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from engine.parallel.collectives import all_to_all
from engine.parallel.functions import Drop, Mask, attention
from engine.parallel.groups import Group

TIME, HEADS = 1, 2
"""Dims of (B, T, H, K)."""


class _Exchange(torch.autograd.Function):
    """Cuts one dim and joins another over the group; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, cut: int, join: int) -> torch.Tensor:
        ctx.group, ctx.dims = group, (join, cut)
        return all_to_all(x, group, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return all_to_all(grads[0], ctx.group, *ctx.dims), None, None, None


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
    """`attention` of this rank's stretch, out_BTHK. Collective over `group`.

    `mask` is of whole rows: a `Band`, (B, 1, T, T), or with a number for each head inside (`SequenceSlice.own`).
    Keys may be of other rows than queries, of which each rank has a stretch, too. The group's size divides G, so that
    a query head meets its key/value head on one rank.
    """
    if drop is not None:
        drop = partial(drop, first_head=group.position * (q_BTHK.size(HEADS) // group.size))
    # (B, T / n, H, K) -> (B, T, H / n, K): with n = 2 and 4 heads, rank 0 gets heads 0 and 1 of the whole row, rank 1
    # heads 2 and 3. Attention needs all positions of a head, and no two heads need each other.
    rows = [_Exchange.apply(x, group, HEADS, TIME) for x in (q_BTHK, k_BTGK, v_BTGK)]
    # (B, T, H / n, K) -> (B, T / n, H, K): the exchange with both dims swapped is its own inverse.
    return _Exchange.apply(attention(*rows, mask, scale, drop), group, TIME, HEADS)  # type: ignore[no-any-return]
