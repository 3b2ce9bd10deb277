"""Frozen parameters of a pipeline stage: weights without gradients, moments and master copies.

DeepSpeed's optimizers leave them alone. Under ZeRO-3 each data rank has a partition of the working weight, as of any
other; otherwise each has all of it. For checkpoints every data rank has an equal range, whatever the ZeRO stage, so
that all of them share the writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from engine.parallel.collectives import gather_along
from engine.parallel.groups import Group
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard


class FrozenWeights:
    """Weights of the frozen parameters of one stage, on one rank."""

    def __init__(self, zero_stage: int, named: Sequence[tuple[ParameterSpec, nn.Parameter]], zero: Group) -> None:
        self.named = named
        self._is_partitioned, self._zero = zero_stage == 3, zero

    def parameter_shards(self) -> Iterator[ParameterShard]:
        """Yield live views of this rank's ranges of the working weights."""
        for (spec, parameter), (_, _, partition) in zip(self.named, self.placements(), strict=True):
            start = self._zero.position * partition
            length = max(min(partition, _numel(parameter) - start), 0)
            if length > 0:
                # DeepSpeed keeps its partition in an attribute; the parameter itself is empty while it is not gathered.
                held = parameter.ds_tensor if self._is_partitioned else parameter  # type: ignore[attr-defined]
                flat = held.data.view(-1)
                yield ParameterShard(spec, start, flat.narrow(0, 0 if self._is_partitioned else start, length))

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        """Yield (parameter, offset, partition) as `Placement` defines them."""
        for spec, parameter in self.named:
            # 5 elements on 4 ranks: partitions of 2 that hold 2, 2, 1 and 0, under ZeRO-3 as DeepSpeed cuts them
            yield spec, 0, -(-_numel(parameter) // self._zero.size)

    def refresh(self) -> None:
        """Complete the working weights from the ranges, after these were written. Collective over the ZeRO group."""
        for (_, parameter), (_, _, partition) in zip(self.named, self.placements(), strict=True):
            if self._is_partitioned:
                if getattr(parameter, "ds_secondary_tensor", None) is not None:
                    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]  # holds the old weights
                continue
            flat = parameter.data.view(-1)
            own = flat.new_zeros(partition)
            held = flat[self._zero.position * partition :][:partition]
            own[: held.numel()].copy_(held)
            flat.copy_(gather_along(own, self._zero, 0)[: flat.numel()])


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
