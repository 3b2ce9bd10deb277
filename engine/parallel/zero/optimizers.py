"""State of DeepSpeed's optimizers by parameter: reduced gradients, fp32 master weights, moments.

Three layouts of it: ZeRO-0 keeps whole parameters, ZeRO-1 and 2 a partition of one padded flat buffer per parameter
group, ZeRO-3 a partition of each parameter. All are DeepSpeed's private attributes; `require` names the ones in use,
so that another release fails at the start and not in the middle of a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from engine.errors import EnvironmentProblem
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, ShardRange

Named = list[list[tuple[ParameterSpec, torch.nn.Parameter]]]
"""Parameters of each group, in the order in which the optimizer was given them."""
GradientView = tuple[torch.nn.Parameter, tuple[int, int], tuple[int, int], int]
"""(parameter, shape, stride, start) of its whole gradient in a flat buffer, as rows of which the last may be short."""


DEEPSPEED = "deepspeed>=0.19.8,<0.20"
"""Releases whose private parts are those that this package uses; a test holds it equal to pyproject.toml's."""


class Shards(ABC):
    """Shards that one rank's optimizer holds, whatever the ZeRO stage."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (group, tensor) for each reduced gradient tensor of this rank; valid between last backward and step."""

    @abstractmethod
    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        """Yield, for each tensor of `ranges`, its reduced gradient as consecutive tensors."""

    def gradient_shards(self) -> Iterator[tuple[ParameterSpec, int, torch.Tensor]]:
        """Yield (parameter, first element, gradient) of each parameter shard; `parameter_shards` does it for weights.

        Valid where `gradients` is. Views, in the dtype in which gradients are reduced.
        """
        for (_, ranges), grads in zip(self.ranges(), self.gradient_lists(), strict=True):
            # A range lies in one of the tensors: DeepSpeed cuts them between parameters, or not at all. Sizes 3 and 5
            # begin at 0 and 3, so the range at offset 4 begins with element 1 of the second.
            begins = [0, *accumulate(grad.numel() for grad in grads)]
            for spec, start, offset, length in ranges:
                if length > 0:
                    number = bisect_right(begins, offset) - 1
                    yield spec, start, grads[number].view(-1).narrow(0, offset - begins[number], length)

    @abstractmethod
    def held_gradients(self) -> set[int]:
        """Return the groups of which the optimizer holds reduced gradients; between steps there are none."""

    @abstractmethod
    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        """Yield each tensor that the optimizer updates, with its shard ranges.

        Every data rank yields the same parameters in the same order, with length 0 where it holds nothing of one.
        """

    @abstractmethod
    def groups_of_tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (group, tensor) for each tensor of `ranges`."""

    def parameter_shards(self) -> Iterator[ParameterShard]:
        """Yield live views of this rank's master weights and moments."""
        for held, ranges in self.ranges():
            # "step" is a scalar, equal for all parameters; `StageEngine.set_updates` restores it.
            states = {name: state.view(-1) for name, state in self.optimizer.state[held].items() if name != "step"}
            for spec, start, offset, length in ranges:
                if length > 0:
                    moments = {name: state.narrow(0, offset, length) for name, state in states.items()}
                    yield ParameterShard(spec, start, held.detach().view(-1).narrow(0, offset, length), moments)

    def add_moment(self, name: str) -> None:
        """Keep another fp32 value per element of each parameter, zero at first, beside the optimizer's own moments."""
        for held, _ in self.ranges():
            self.optimizer.state[held][name] = torch.zeros_like(held, memory_format=torch.preserve_format)

    def drop_moment(self, name: str) -> None:
        """Let go of values that `add_moment` keeps."""
        for held, _ in self.ranges():
            del self.optimizer.state[held][name]

    @abstractmethod
    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        """Yield (parameter, offset, partition) as `Placement` defines them."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the master weights into the working weights. Collective over the ZeRO group."""


def require(thing: Any, *names: str) -> None:
    """Check that `thing` has every attribute named.

    Raises:
        EnvironmentProblem: it does not, so this is another release of DeepSpeed.
    """
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise EnvironmentProblem(
            f"this DeepSpeed has no {type(thing).__name__}.{', '.join(missing)}",
            DEEPSPEED,
            f"install that release: pip install '{DEEPSPEED}'",
        )


def prepare_state(
    optimizer: torch.optim.Optimizer, flat: torch.Tensor, moments: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state for one tensor, made now and not at the first step: it can be loaded before that."""
    state = optimizer.state[flat]
    if not state:
        # A tensor on the parameter's device, as torch's fused AdamW wants it.
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for moment in moments:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    """Return True if a gradient is left on a parameter, or in DeepSpeed's own attribute for it (`grad_accum`)."""
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

    def groups_of_tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index, group in enumerate(self.groups):
            yield from ((index, parameter) for _, parameter in group)

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for group in self.groups:
            yield from ((parameter, [(spec, 0, 0, parameter.numel())]) for spec, parameter in group)

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        for group in self.groups:
            for spec, parameter in group:
                yield spec, 0, parameter.numel()

    def refresh(self) -> None:
        """Do nothing: the working weights are the master weights."""


class FlatShards(Shards):
    """ZeRO-1 and 2: each data rank holds one slice of every group's padded flat buffer."""

    reduced = None
    """None: DeepSpeed keeps no buffer for reduced gradients between two steps, so each reduction makes one."""

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
            # One flat tensor or a list of them, depending on DeepSpeed's path (accumulation in one buffer or not).
            yield [held] if isinstance(held, torch.Tensor) else held

    def held_gradients(self) -> set[int]:
        return {index for index, held in self.zero.averaged_gradients.items() if held is not None}

    def groups_of_tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from enumerate(self.zero.single_partition_of_fp32_groups)

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for index, group in enumerate(self.groups):
            flat, ranges = self.zero.single_partition_of_fp32_groups[index], []
            # Partitions of 6, parameters at offsets 0 and 4 with 4 and 8 elements: data rank 1 holds the buffer from 6
            # to 12, so nothing of the first and (start 2, offset 0, length 6) of the second.
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
        """Yield (views, elements) of a buffer per group, laid out as the padded flat buffer of the shards."""
        for index, group in enumerate(self.groups):
            offsets = self.zero.round_robin_bit16_offsets[index]
            views: list[GradientView] = [
                (parameter, (1, parameter.numel()), (parameter.numel(), 1), offset)
                for (_, parameter), offset in zip(group, offsets, strict=True)
            ]
            yield views, self.zero.partition_size[index] * data_size

    def split(self, shares: list[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (group, its entry of DeepSpeed's `averaged_gradients`) from this rank's share of each buffer."""
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

    def groups_of_tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        for sub_group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            yield self.zero.sub_group_to_group_id[sub_group], flat

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        for flat, parameters in zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True):
            offset, ranges = 0, []
            for parameter in parameters:
                # All partitions of a parameter are equally long; the last ones may be shorter in real elements, or
                # empty: 5 elements on 4 ranks are partitions of 2 that hold 2, 2, 1 and 0.
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
        self.zero.invalidate_secondary_tensor()  # second copies (`gather_within`), which hold the old weights

    @property
    def reduced(self) -> torch.Tensor:
        """The flat buffer in which DeepSpeed keeps the reduced gradients of all partitions, in their order."""
        buffer: torch.Tensor = self.zero.grad_partitions_flat_buffer
        return buffer

    def whole_gradients(self, data_size: int) -> Iterator[tuple[list[GradientView], int]]:
        """Yield (views, elements) of one buffer (data ranks, elements of a rank): a parameter is some columns of it."""
        # Partitions of 2 and 3 elements on 2 ranks: the buffer is (2, 5), the first parameter columns 0 and 1, the
        # second columns 2 to 4. A reduce-scatter gives rank r row r, which is the order of its own flat buffer.
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
        """Yield (sub-group, its entry of DeepSpeed's `averaged_gradients`) from this rank's share of the buffer."""
        (share,) = shares
        start = 0
        for sub_group, parameters in enumerate(self.zero.fp16_groups):
            held = []
            for parameter in parameters:
                held.append(share.narrow(0, start, parameter.partition_numel()))
                start += parameter.partition_numel()
            yield sub_group, held


class NoShards(Shards):
    """Nothing: a stage that trains no parameter has no optimizer."""

    optimizer: Any = None

    def gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from ()

    def gradient_lists(self) -> Iterator[Sequence[torch.Tensor]]:
        yield from ()

    def held_gradients(self) -> set[int]:
        return set()

    def groups_of_tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from ()

    def ranges(self) -> Iterator[tuple[torch.Tensor, list[ShardRange]]]:
        yield from ()

    def placements(self) -> Iterator[tuple[ParameterSpec, int, int]]:
        yield from ()

    def refresh(self) -> None:
        """Do nothing."""


def shards(
    zero_stage: int, engine: Any, optimizer: torch.optim.Optimizer | None, groups: Named, data_rank: int
) -> Shards:
    """Return the view of this rank's optimizer state that fits the ZeRO stage; None: nothing is trained."""
    if optimizer is None:
        return NoShards()
    if zero_stage == 0:
        return WholeShards(optimizer, groups)
    if zero_stage == 3:
        return PartitionedShards(engine, optimizer, groups, data_rank)
    return FlatShards(engine, optimizer, groups, data_rank)
