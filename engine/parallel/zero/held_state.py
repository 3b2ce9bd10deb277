"""Weights and optimizer state that a rank holds of its pipeline stage: seen as shards, filled, and added to.

Checkpoints, regularisers and the making of another engine work on these shards alone; passes and the step are
`engine.parallel.zero.engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from engine.errors import CheckpointError
from engine.parallel.agreement import on_all
from engine.parallel.groups import Groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterGroup, ParameterShard, Placement
from engine.parallel.zero.frozen import FrozenWeights
from engine.parallel.zero.optimizers import Named, Shards

RowValues = Callable[[ParameterSpec, int, int], torch.Tensor]
"""(parameter, first, end) -> rows [first, end) of the whole parameter, padding rows included; fp32 or narrower."""


class HeldState:
    """Master weights and moments of one pipeline stage, as far as this rank holds them."""

    def __init__(
        self,
        groups: Groups,
        zero_stage: int,
        parameter_groups: list[ParameterGroup],
        named: Named,
        shards: Shards,
        frozen: FrozenWeights,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """`named` are the trained parameters by group, `shards` what this rank holds of them, `frozen` the others."""
        self.groups, self.zero_stage, self.parameter_groups = groups, zero_stage, parameter_groups
        self.optimizer = optimizer
        self.added_moments: dict[str, bool] = {}
        """Moments beside the optimizer's own, and whether a checkpoint may lack them."""
        self._trained = [group for group in parameter_groups if group.trained_since is not None]
        self._named, self._shards, self._frozen = named, shards, frozen

    def parameter_shards(self) -> list[ParameterShard]:
        """Return live views of all master weights and moments that this rank holds."""
        return [*self._shards.parameter_shards(), *self._frozen.parameter_shards()]

    def gradient_shards(self) -> Iterator[tuple[ParameterSpec, int, torch.Tensor]]:
        """Yield (parameter, first element, gradient) of what this rank holds of the reduced gradients, flat.

        For what `accept` of `step` looks at: summed over the whole batch, ties and tensor ranks, and not clipped.
        """
        return self._shards.gradient_shards()

    def placements(self) -> list[Placement]:
        """Return the placement of every parameter of this stage on all of the stage's ranks."""
        own = (self.groups.coordinates.stage,)
        groups = {spec.name: group for group in self.parameter_groups for spec in group.specs}
        added = tuple(self.added_moments)
        moments = {name: (*group.moments, *added) if group.moments else () for name, group in groups.items()}
        return [
            Placement(spec, groups[spec.name].tied or own, offset, partition, moments[spec.name])
            for held in (self._shards, self._frozen)
            for spec, offset, partition in held.placements()
        ]

    def add_moment(self, name: str, begins_at_zero: bool) -> None:
        """Keep another fp32 value per element of every trained parameter (an average of weights, Fisher information).

        It is sharded as the optimizer's moments are, zero at first, and part of checkpoints. With `begins_at_zero` a
        checkpoint without it can be loaded and leaves it at zero. Call on every rank, before anything is loaded.
        """
        taken = {"step", *self.added_moments, *(moment for group in self.parameter_groups for moment in group.moments)}
        assert name.isidentifier(), name
        assert name not in taken, f"{name} is there already"
        self._shards.add_moment(name)
        self.added_moments[name] = begins_at_zero

    def keep_moments(self, names: Mapping[str, bool]) -> bool:
        """Add and drop moments so that these are there beside the optimizer's; return True if that changed any.

        Names map to `begins_at_zero` of `add_moment`. Call on every rank.
        """
        dropped = self.added_moments.keys() - names.keys()
        for name in dropped:
            self._shards.drop_moment(name)
            del self.added_moments[name]
        added = [name for name in names if name not in self.added_moments]
        for name in added:
            self.add_moment(name, names[name])
        return bool(dropped or added)

    @property
    def zero_moments(self) -> frozenset[str]:
        """Added moments that a checkpoint may lack."""
        return frozenset(name for name, begins_at_zero in self.added_moments.items() if begins_at_zero)

    def working_weights(self) -> Iterator[tuple[ParameterSpec, torch.Tensor]]:
        """Yield (parameter, weight that the module computes with) where each rank holds it whole: none under ZeRO-3."""
        if self.zero_stage < 3:
            yield from ((spec, parameter.data) for group in self._named for spec, parameter in group)
            yield from ((spec, parameter.data) for spec, parameter in self._frozen.named)

    def fill(self, value: RowValues, moments: Callable[[str], RowValues] | None = None) -> None:
        """Set every parameter to the rows that `value` gives of the whole one, some rows at a time.

        With `moments`, which gives such a function for each of the optimizer's moments, these are set, too; else they
        stay. Each rank asks for the rows of its own shards. Collective over the world.

        Raises:
            PalimpsestError: what `value` raises on some rank, on every rank.
        """

        def fill_shards() -> None:
            rank, size = self.groups.tensor.position, self.groups.tensor.size
            with torch.no_grad():
                for shard in self.parameter_shards():
                    if not shard.length:
                        continue
                    shard.weight.copy_(values_of(shard, value, rank, size))
                    if moments is not None:
                        for name in shard.moments.keys() - self.added_moments:
                            shard.moments[name].copy_(values_of(shard, moments(name), rank, size))

        on_all(fill_shards, self.groups.world, CheckpointError)
        self.refresh()

    def refresh(self, frozen: bool = True) -> None:
        """Copy the master weights to the working weights, after the former were written. Collective over the world.

        Without `frozen` no frozen weight was written: their ranges, the size of a pretrained model beside an adapter,
        are not gathered.
        """
        self._shards.refresh()
        if frozen:
            self._frozen.refresh()

    def reset_moments(self) -> None:
        """Set the optimizer's moments to zero, as before the first update; added ones stay."""
        for shard in self._shards.parameter_shards():
            for name, moment in shard.moments.items():
                if name not in self.added_moments:
                    moment.zero_()
        # Moments that start from zero need the bias correction of first updates.
        self.set_updates(0)

    def set_updates(self, count: int, before: Sequence[int] = ()) -> None:
        """Set the number of updates that Adam's moments have seen (for its bias correction).

        `before[n]` of the `count` updates came before run stage n; parameters that are trained since then have seen the
        others. Without `before` all parameters have seen all of them.
        """
        since = [group.trained_since or 0 for group in self._trained]
        for index, held in self._shards.groups_of_tensors():
            number = since[index]
            assert self.optimizer is not None
            self.optimizer.state[held]["step"].fill_(float(count - (before[number] if number < len(before) else 0)))


def values_of(shard: ParameterShard, value: RowValues, tensor_rank: int, tensor_size: int) -> torch.Tensor:
    """Return the flat values of a shard, from the rows of the whole parameter that hold it."""
    spec = shard.spec
    row_numel = math.prod(spec.local_shape(tensor_size)[1:])
    # Rows of 4, elements 6 to 9 of the local part: its rows 1 and 2, of which the middle four elements are the shard.
    first, end = shard.start // row_numel, -(-(shard.start + shard.length) // row_numel)
    parts = []
    for whole_first, count in spec.rows_of_part(first, end, tensor_rank, tensor_size):
        rows = value(spec, whole_first, whole_first + count)
        if spec.sharding.dim == 1 and tensor_size > 1:
            columns = [rows.narrow(1, start, length) for start, _, length in spec.extents(tensor_rank, tensor_size)]
            rows = torch.cat(columns, 1)
        parts.append(rows.reshape(-1))
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    begin = shard.start - first * row_numel
    return flat[begin : begin + shard.length]
