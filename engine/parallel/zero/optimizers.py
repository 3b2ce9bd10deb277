"""What DeepSpeed's optimizers hold, by parameter: reduced gradients, fp32 master weights, moments.

Three shapes of the same thing: ZeRO-0 keeps whole parameters, ZeRO-1 and 2 a partition of one padded flat buffer
per parameter group, ZeRO-3 a partition of each parameter. All are DeepSpeed's private attributes; `require` names
the ones in use, so that another release fails at the start and not in the middle of a run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from engine.errors import EnvironmentProblem
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, ShardRange

Named = list[list[tuple[ParameterSpec, torch.nn.Parameter]]]
"""Parameters of each group, in the order in which the optimizer was given them."""
GradientView = tuple[torch.nn.Parameter, tuple[int, int], tuple[int, int], int]
"""(parameter, shape, stride, start) of its whole gradient in a flat buffer, as rows of which the last may be short."""


class Shards(Protocol):
    """What one rank's optimizer holds, whatever the ZeRO stage."""

    optimizer: torch.optim.Optimizer

    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(group, tensor) for every reduced gradient tensor of this rank; valid between last backward and step."""
        ...

    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        """Yield, for each tensor of `parts`, its reduced gradient in shards that follow one another."""
        ...

    def gradient_shards(self) -> Iterator[tuple[ParameterSpec, int, torch.Tensor]]:
        """Yield (parameter, first element, gradient) of each parameter shard, as `shards` does for weights.

        Valid where `gradients` is. Views, in the dtype in which gradients are reduced.
        """
        for (_, ranges), grads in zip(self.ranges(), self.gradient_lists(), strict=True):
            # A part lies in one of the shards: DeepSpeed cuts them between parameters, or not at all. Sizes 3 and 5
            # begin at 0 and 3, so the part at offset 4 is element 1 of the second.
            begins = [0, *accumulate(grad.numel() for grad in grads)]
            for spec, start, offset, length in ranges:
                if length > 0:
                    number = bisect_right(begins, offset) - 1
                    yield spec, start, grads[number].view(-1).narrow(0, offset - begins[number], length)

    def held_gradients(self) -> set[int]:
        """Groups of which the optimizer holds reduced gradients; between steps there are none."""
        ...

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        """Each tensor that the optimizer updates, with what lies in it; the same parameters on every data rank."""
        ...

    def parameter_shards(self) -> Iterator[ParameterShard]:
        """Live views of this rank's master weights and moments."""
        for held, ranges in self.ranges():
            states = {name: state.view(-1) for name, state in self.optimizer.state[held].items() if name != "step"}
            for spec, start, offset, length in ranges:
                if length > 0:
                    moments = {name: state.narrow(0, offset, length) for name, state in states.items()}
                    yield ParameterShard(spec, start, held.detach().view(-1).narrow(0, offset, length), moments)

    def add_moment(self, name: str) -> None:
        """Keep another fp32 value per element of each parameter, zero at first, beside the optimizer's own moments."""
        for held, _ in self.ranges():
            self.optimizer.state[held][name] = torch.zeros_like(held, memory_format=torch.preserve_format)

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        """(parameter, offset, partition) as `Placement` describes them."""
        ...

    def refresh(self) -> None:
        """Copies the master weights into the working weights. Collective over the ZeRO group."""
        ...


def require(thing: Any, *names: str) -> None:
    """Raises `EnvironmentProblem` unless `thing` has every attribute named."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise EnvironmentProblem(
            f"this DeepSpeed has no {type(thing).__name__}.{', '.join(missing)}",
            "deepspeed>=0.19.8,<0.20",
            "install that release: pip install 'deepspeed>=0.19.8,<0.20'",
        )


def prepare_state(
    optimizer: torch.optim.Optimizer, flat: torch.Tensor, moments: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The optimizer's state for one tensor, made now and not at the first step: it can be saved and loaded at once."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for moment in moments:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    """Whether a gradient is left on a parameter, DeepSpeed's own attribute for it included."""
    held = (parameter.grad, getattr(parameter, "grad_accum", None))
    return any(gradient is not None and bool(gradient.any()) for gradient in held)


class WholeShards(Shards):
    """ZeRO-0: every rank holds everything."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Named) -> None:
        self.optimizer, self.groups = optimizer, groups
        for group, settings in zip(groups, optimizer.param_groups, strict=True):
            for _, parameter in group:
                prepare_state(optimizer, parameter, settings["moments"])

    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index, group in enumerate(self.groups):
            for _, parameter in group:
                assert parameter.grad is not None
                yield index, parameter.grad

    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        yield from ([grad] for _, grad in self.gradients())

    def held_gradients(self) -> set[int]:
        return set()  # they are the parameters' own

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for group in self.groups:
            yield from ((parameter, [(spec, 0, 0, parameter.numel())]) for spec, parameter in group)

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        for group in self.groups:
            for spec, parameter in group:
                yield spec, 0, parameter.numel()

    def refresh(self) -> None:
        """Nothing: the working weights are the master weights."""


class FlatShards(Shards):
    """ZeRO-1 and 2: each data rank holds one slice of every group's padded flat buffer."""

    reduced = None
    """DeepSpeed has no place for reduced gradients between two steps."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: Named, data_rank: int) -> None:
        self.zero, self.optimizer, self.groups, self.data_rank = engine.optimizer, optimizer, groups, data_rank
        require(
            self.zero,
            "averaged_gradients",
            "single_partition_of_fp32_groups",
            "round_robin_bit16_offsets",
            "partition_size",
            "scaled_global_norm",
            "check_grad_overflow",
            "update_lp_params",
        )
        for flat, settings in zip(self.zero.single_partition_of_fp32_groups, optimizer.param_groups, strict=True):
            prepare_state(optimizer, flat, settings["moments"])

    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index, grads in enumerate(self.gradient_lists()):
            yield from ((index, grad) for grad in grads)

    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        for index in range(len(self.groups)):
            held = self.zero.averaged_gradients[index]
            yield [held] if isinstance(held, torch.Tensor) else held

    def held_gradients(self) -> set[int]:
        return {index for index, held in self.zero.averaged_gradients.items() if held is not None}

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for index, group in enumerate(self.groups):
            flat, ranges = self.zero.single_partition_of_fp32_groups[index], []
            first = self.data_rank * self.zero.partition_size[index]
            for (spec, parameter), offset in zip(group, self.zero.round_robin_bit16_offsets[index], strict=True):
                start = max(first - offset, 0)
                end = min(first + flat.numel() - offset, parameter.numel())
                ranges.append((spec, start, offset + start - first, end - start) if start < end else (spec, 0, 0, 0))
            yield flat, ranges

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        for index, group in enumerate(self.groups):
            for (spec, _), offset in zip(group, self.zero.round_robin_bit16_offsets[index], strict=True):
                yield spec, offset, self.zero.partition_size[index]

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def whole_gradients(self, data_size: int) -> Iterator[tuple[list[GradientView], int]]:
        """(places, elements) of a buffer per group: the padded flat buffer that the shards are slices of."""
        for index, group in enumerate(self.groups):
            offsets = self.zero.round_robin_bit16_offsets[index]
            views: list[GradientView] = [
                (parameter, (1, parameter.numel()), (parameter.numel(), 1), offset)
                for (_, parameter), offset in zip(group, offsets, strict=True)
            ]
            yield views, self.zero.partition_size[index] * data_size

    def split(self, shares: list[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(group, what DeepSpeed holds of its reduced gradients) from this rank's share of each buffer."""
        yield from ((index, [share]) for index, share in enumerate(shares))


class PartitionedShards(Shards):
    """ZeRO-3: each data rank holds one slice of every parameter, side by side in flat sub-groups."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: Named, data_rank: int) -> None:
        self.zero, self.optimizer, self.data_rank = engine.optimizer, optimizer, data_rank
        require(
            self.zero,
            "averaged_gradients",
            "fp16_groups",
            "fp32_partitioned_groups_flat",
            "sub_group_to_group_id",
            "_get_norm_groups",
            "_reassign_or_swap_out_partitioned_parameters",
            "invalidate_secondary_tensor",
        )
        self.specs = {id(parameter): spec for group in groups for spec, parameter in group}
        for sub_group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            settings = optimizer.param_groups[self.zero.sub_group_to_group_id[sub_group]]
            prepare_state(optimizer, flat, settings["moments"])

    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        for sub_group, held in self.zero.averaged_gradients.items():
            yield from ((self.zero.sub_group_to_group_id[sub_group], tensor) for tensor in held)

    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        yield from (self.zero.averaged_gradients[number] for number in range(len(self.zero.fp16_groups)))

    def held_gradients(self) -> set[int]:
        return {self.zero.sub_group_to_group_id[i] for i, held in self.zero.averaged_gradients.items() if held}

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for flat, parameters in zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True):
            offset, ranges = 0, []
            for parameter in parameters:
                partition = parameter.partition_numel()
                start = self.data_rank * partition
                length = max(min(partition, parameter.ds_numel - start), 0)
                ranges.append((self.specs[id(parameter)], start, offset, length))
                offset += partition
            yield flat, ranges

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        for parameters in self.zero.fp16_groups:
            for parameter in parameters:
                yield self.specs[id(parameter)], 0, parameter.partition_numel()

    def refresh(self) -> None:
        for sub_group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self.zero.invalidate_secondary_tensor()  # copies of `gather_within`, of the weights that were

    @property
    def reduced(self) -> torch.Tensor:
        """Where DeepSpeed keeps the reduced gradients of all partitions, in their order."""
        buffer: torch.Tensor = self.zero.grad_partitions_flat_buffer
        return buffer

    def whole_gradients(self, data_size: int) -> Iterator[tuple[list[GradientView], int]]:
        """(places, elements) of one buffer (data ranks, elements of a rank): each parameter is some columns of it."""
        parameters = [parameter for sub_group in self.zero.fp16_groups for parameter in sub_group]
        total = sum(parameter.partition_numel() for parameter in parameters)
        views: list[GradientView] = []
        start = 0
        for parameter in parameters:
            width = parameter.partition_numel()
            views.append((parameter, (data_size, width), (total, 1), start))
            start += width
        yield views, data_size * total

    def split(self, shares: list[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(sub-group, what DeepSpeed holds of its reduced gradients) from this rank's share of the buffer."""
        (share,) = shares
        start = 0
        for sub_group, parameters in enumerate(self.zero.fp16_groups):
            held = []
            for parameter in parameters:
                held.append(share.narrow(0, start, parameter.partition_numel()))
                start += parameter.partition_numel()
            yield sub_group, held


def shards(zero_stage: int, engine: Any, optimizer: torch.optim.Optimizer, groups: Named, data_rank: int) -> Shards:
    """What this rank's optimizer holds, for one ZeRO stage."""
    if zero_stage == 0:
        return WholeShards(optimizer, groups)
    if zero_stage == 3:
        return PartitionedShards(engine, optimizer, groups, data_rank)
    return FlatShards(engine, optimizer, groups, data_rank)
