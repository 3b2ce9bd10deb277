"""Optimizer state in host memory: `offload: optimizer`. Master weights and moments are kept and updated there.

DeepSpeed's own offload allocates them (page-locked), and its step copies the updated weights back. Its handling of
gradients is not used: it moves them to the host and back at every micro-batch, and then holds them where norm and ties
do not look. Here gradients stay on the device until the step, as they do without offload, so norm, clipping, ties and
accumulation are the same. Then each parameter group's share goes to the host once, on a stream of its own: the copy of
one group overlaps the update of the one before, and so does the copy of its new weights back.

On a CPU the host is the device: the same code with plain copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from engine.parallel.zero.optimizers import require


class HostState:
    """Switches DeepSpeed's offload off in its backward pass, and supplies it with gradients in its step."""

    flag: str
    """DeepSpeed's switch: on while it allocates and steps, off while gradients are made."""
    masters: list[torch.Tensor]
    """fp32 master weights of each group (sub-group under ZeRO-3), on the host, with their gradients in `.grad`."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.zero, self.device = engine.optimizer, device
        require(self.zero, self.flag, "_optimizer_step", "unscale_and_clip_grads", "averaged_gradients", "device")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._update = self.zero._optimizer_step
        self.zero._optimizer_step = self._update_when_there
        # The gradients were scaled on their way to the host (`_copy`); doing it again would clip twice.
        self.zero.unscale_and_clip_grads = lambda *_: None
        self.accelerator: Any = get_accelerator()
        # The device of DeepSpeed's gradient buffers; with its offload on it is the host.
        self.zero.device = self.accelerator.current_device_name()
        setattr(self.zero, self.flag, False)

    def step(self, scale: torch.Tensor | None, take: Callable[[], None]) -> None:
        """Send the gradients times `scale` to the host, and call `take`, DeepSpeed's step. Gradients are used up."""
        self._send(scale)
        setattr(self.zero, self.flag, True)
        try:
            take()
        finally:
            setattr(self.zero, self.flag, False)

    def _send(self, scale: torch.Tensor | None) -> None:
        """Start the copies of all groups, in the order in which they are updated."""
        if self._stream is None:
            for index in range(len(self.masters)):
                self._copy(index, scale)
            return
        # The gradients must be complete before the copies read them.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for index in range(len(self.masters)):
                self._copy(index, scale)
                self._arrived[index] = torch.cuda.Event()
                self._arrived[index].record()

    def _copy(self, index: int, scale: torch.Tensor | None) -> None:
        target, at = self.masters[index].grad, 0
        assert target is not None
        for part in self.zero.averaged_gradients[index]:
            source = part.view(-1).float()  # a narrower one is scaled as fp32
            if scale is not None:
                source.mul_(scale)
            target.view(-1)[at : at + source.numel()].copy_(source, non_blocking=True)
            at += source.numel()

    def _update_when_there(self, index: int) -> None:
        """Wait for a group's gradients, free those on the device, and update the group.

        Replaces DeepSpeed's update of a group, and calls it.
        """
        if event := self._arrived.pop(index, None):
            event.synchronize()  # the host waits, not a stream: the update runs on the CPU
        self.zero.averaged_gradients[index] = None
        self._update(index)


class FlatHostState(HostState):
    """ZeRO-1 and 2."""

    flag = "cpu_offload"

    def __init__(self, engine: Any, device: torch.device) -> None:
        super().__init__(engine, device)
        zero = self.zero
        require(zero, "single_partition_of_fp32_groups", "_offload_gradient_safety_enabled", "contiguous_gradients")
        self.masters = zero.single_partition_of_fp32_groups
        # Events that protect the gradient copies of DeepSpeed's backward pass, which do not happen here.
        zero._offload_gradient_safety_enabled = False
        # DeepSpeed turns this on with its offload, whatever the configuration says.
        zero.contiguous_gradients = engine.zero_contiguous_gradients()
        # Buffers for those copies, each as large as the largest parameter.
        zero.temp_grad_buffer_for_gpu_offload = zero.temp_grad_buffer_for_cpu_offload = None


class PartitionedHostState(HostState):
    """ZeRO-3."""

    flag = "offload_optimizer"

    def __init__(self, engine: Any, device: torch.device) -> None:
        super().__init__(engine, device)
        zero = self.zero
        partitions = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
        require(zero, "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "grad_partitions_flat_buffer")
        require(zero, partitions, "inf_or_nan_tracker", "_unflatten_partitioned_parameters")
        self.masters = zero.fp32_partitioned_groups_flat
        # Allocated on the host while DeepSpeed's switch was on; the backward pass needs them on the device.
        zero.inf_or_nan_tracker = zero.inf_or_nan_tracker.to(device)
        zero.grad_partitions_flat_buffer = zero.grad_partitions_flat_buffer.to(device)
        for name, held in getattr(zero, partitions).items():
            # A view of the old buffer: its offset and length say which part of the new one takes its place.
            own = zero.grad_partitions_flat_buffer.narrow(0, held.storage_offset(), held.numel())
            getattr(zero, partitions)[name] = own
        self._on_their_way = [self._page_locked(index) for index in range(len(self.masters))]
        zero._reassign_or_swap_out_partitioned_parameters = self._hand_back

    def _page_locked(self, index: int) -> torch.Tensor:
        """Return page-locked memory from which a group's new weights are copied to the device, in their dtype.

        It is the master itself where the weights are fp32.
        """
        pin, master = self.accelerator.pin_memory, self.masters[index]
        dtype = self.zero.fp16_partitioned_groups_flat[index].dtype
        if dtype == master.dtype:
            master.data = pin(master.data)
            return master
        return pin(torch.empty(master.shape, dtype=dtype))

    def _hand_back(self, index: int) -> None:
        """Copy a group's new weights to the device.

        Replaces DeepSpeed's method, which copies from pageable memory and in fp32.
        """
        source = self._on_their_way[index]
        if source is not self.masters[index]:
            # Cast on the host: half the bytes cross the bus, and page-locked memory lets the copy run by itself.
            source.copy_(self.masters[index].data)
        self.zero.fp16_partitioned_groups_flat[index].data.copy_(source.data, non_blocking=True)
        self.zero._unflatten_partitioned_parameters(index)


def host_state(zero_stage: int, engine: Any, device: torch.device) -> HostState:
    """Make the host state of an engine built with DeepSpeed's `offload_optimizer`; call before any backward pass."""
    return (PartitionedHostState if zero_stage == 3 else FlatHostState)(engine, device)
