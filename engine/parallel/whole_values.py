"""Whole values of a few small parameters on every rank, from the shards that the ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard

Values = dict[str, torch.Tensor]
"""Whole tensors (fp32) by the logical name of their parameter."""


def whole_values(
    specs: Sequence[ParameterSpec],
    shards: Iterable[ParameterShard],
    value: Callable[[ParameterShard], torch.Tensor],
    groups: Groups,
    zero_stage: int,
    device: torch.device,
) -> Values:
    """Return what `value` gives of each shard (an fp32 number for each element), put together to whole tensors.

    `specs` are the same parameters in the same order on every rank. Sums have one term that is not zero, so the result
    is equal on all ranks, bit for bit, and in all layouts. Collective over the world.
    """
    flat = torch.zeros(sum(torch.Size(spec.shape).numel() for spec in specs), device=device)
    views = flat.split([torch.Size(spec.shape).numel() for spec in specs])
    whole = {spec.name: view.view(spec.shape) for spec, view in zip(specs, views, strict=True)}
    parts: Values = {}
    for shard in shards:
        if shard.spec.name in whole and _counts(shard, groups, zero_stage):
            local = parts.setdefault(shard.spec.name, torch.zeros(shard.spec.local_numel(groups.tensor.size)))
            local[shard.start : shard.start + shard.length] = value(shard).float().cpu()
    for spec in specs:
        if spec.name in parts:
            _place(spec, parts[spec.name], whole[spec.name], groups)
    all_reduce(flat, groups.world)
    return whole


def part_of(shard: ParameterShard, whole: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the elements of a whole tensor that a shard holds, flat."""
    part = shard.spec.part(whole, groups.tensor.position, groups.tensor.size)
    return part.reshape(-1)[shard.start : shard.start + shard.length]


def _place(spec: ParameterSpec, local: torch.Tensor, whole: torch.Tensor, groups: Groups) -> None:
    """Write this tensor rank's part of a parameter into the whole one."""
    part, dim = local.view(spec.local_shape(groups.tensor.size)), spec.sharding.dim
    if dim is None:
        whole.copy_(part)
        return
    for start, own, length in spec.extents(groups.tensor.position, groups.tensor.size):
        whole.narrow(dim, start, length).copy_(part.narrow(dim, own, length))


def _counts(shard: ParameterShard, groups: Groups, zero_stage: int) -> bool:
    """Return True if no other rank has a copy of the shard that counts."""
    is_copy = shard.spec.sharding.dim is None and groups.tensor.position > 0
    return not is_copy and (zero_stage > 0 or groups.zero.position == 0)
