"""Collectives over a `Group`: the only calls of `torch.distributed` beside `groups`. Over one rank they are free."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.groups import Group

Work = dist.Work
"""A send or receive under way; `wait()` returns when its tensor may be reused or read."""


def all_reduce(tensor: torch.Tensor, group: Group, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` in place over the group ("sum", "max" or "min") and return it. Collective over `group`."""
    if group.size > 1:
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()), group=group.handle)
    return tensor


def reduce_scatter(tensor: torch.Tensor, group: Group, share: torch.Tensor | None = None) -> torch.Tensor:
    """Return this rank's share of the sum of a flat tensor over the group: one of `group.size` equal runs, in order.

    It is written to `share`, or to a new tensor. Collective over `group`; over one rank it is the tensor itself.
    """
    if group.size == 1:
        return tensor
    share = tensor.new_empty(tensor.numel() // group.size) if share is None else share
    dist.reduce_scatter_tensor(share, tensor, group=group.handle)
    return share


def gather_along(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Return the ranks' tensors, alike in shape, joined along `dim` in group order. Collective over `group`."""
    if group.size == 1:
        return tensor
    # With n ranks and dim 1: n x (B, T, D) -> (n, B, T, D) -> (B, n, T, D) -> (B, n T, D). Torch gathers along dim 0
    # only; its variant with a list of outputs would copy each of them.
    parts = tensor.new_empty((group.size, *tensor.shape))
    dist.all_gather_into_tensor(parts.view(-1), tensor.contiguous().view(-1), group=group.handle)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_along(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Return this rank's part of the ranks' sum, cut evenly along `dim` in group order. Collective over `group`."""
    if group.size == 1:
        return tensor
    # (B, T, D) -> (B, n, T / n, D) -> (n, B, T / n, D), of which rank r receives the sum of row r.
    parts = tensor.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=group.handle)
    return own


def all_to_all(tensor: torch.Tensor, group: Group, split_dim: int, join_dim: int) -> torch.Tensor:
    """Cut `tensor` evenly along `split_dim`, send a part to each rank and join the parts received along `join_dim`.

    Collective over `group`; with the two dims exchanged it is its own inverse.
    """
    if group.size == 1:
        return tensor
    parts = tensor.unflatten(split_dim, (group.size, -1)).movedim(split_dim, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group.handle)
    return received.movedim(0, join_dim).flatten(join_dim, join_dim + 1)


def exchange(tensor: torch.Tensor, sizes: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Send `sizes[r]` elements of a flat tensor to each rank r in order; return those received, `received[r]` from r.

    Collective over `group`.
    """
    target = tensor.new_empty(sum(received))
    dist.all_to_all_single(target, tensor.contiguous(), received, sizes, group=group.handle)
    return target


def broadcast_object(value: Any, group: Group, source: int = 0) -> Any:
    """Return the object of the rank at position `source` on every rank. Collective over `group`."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[source], group=group.handle)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Return every rank's object in group order, on every rank. Collective over `group`; for small objects."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def send(tensor: torch.Tensor, group: Group, position: int) -> dist.Work:
    """Start sending to the rank at `position` and return at once; keep `tensor` until the work is waited for."""
    work = dist.isend(tensor, dst=group.ranks[position], group=group.handle)
    assert work is not None
    return work


def start_receiving(tensor: torch.Tensor, group: Group, position: int) -> dist.Work:
    """Start filling `tensor` from the rank at `position` and return at once; wait for the work."""
    work = dist.irecv(tensor, src=group.ranks[position], group=group.handle)
    assert work is not None
    return work


def receive(tensor: torch.Tensor, group: Group, position: int) -> torch.Tensor:
    """Fill `tensor` from the rank at `position`; on CUDA the stream waits, not the host."""
    start_receiving(tensor, group, position).wait()
    return tensor


def barrier(group: Group) -> None:
    """Return when every rank has arrived. Collective over `group`."""
    if group.size > 1:
        dist.barrier(group=group.handle)


def first_error(error: Exception | None, group: Group) -> Exception | None:
    """Return the error of the first rank that has one, on every rank. Collective over `group`: all fail or none."""
    return next((found for found in gather_objects(error, group) if found is not None), None)
