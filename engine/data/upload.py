"""A step's inputs on their way to a GPU, beside what it computes.

The reading thread writes all tensors of a step one behind the other into page-locked memory, copies them at once on a
stream of their own, and notes an event behind the copy. Two such blocks take turns. Invariants: no block is written
before the copy from it is done, which the reading thread waits for; and the stream that computes waits for the event
of what it is given, the host for nothing.

B batch, S bytes of a step.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

Inputs = dict[str, torch.Tensor]

NUM_BLOCKS = 2
"""One is written while the other is copied."""
_ALIGNMENT_BYTES = 256
"""Multiple of bytes at which each tensor begins, as torch's own allocator has it."""


@dataclass
class _Block:
    """Page-locked memory, and the event behind the last copy from it."""

    memory_S: torch.Tensor
    copied: torch.cuda.Event


@dataclass(frozen=True)
class Upload:
    """Inputs that are on the GPU or under way."""

    inputs: list[Inputs]
    memory_S: torch.Tensor
    copied: torch.cuda.Event

    def arrive(self) -> list[Inputs]:
        """Return the inputs, for the work that the calling thread puts on the GPU's current stream from here on."""
        computing = torch.cuda.current_stream(self.memory_S.device)
        computing.wait_event(self.copied)
        self.memory_S.record_stream(computing)  # it was allocated for the copying stream: not to be reused before
        return self.inputs


class Uploader:
    """Copies to one GPU; for the reading thread alone, with that GPU as its current device."""

    def __init__(self, gpu: torch.device) -> None:
        self._gpu = gpu
        self._stream = torch.cuda.Stream(gpu)
        # the reading thread sleeps until a copy is done (`blocking`): spinning would take the training thread's time
        empty = torch.empty(0, dtype=torch.uint8)
        self._blocks = itertools.cycle([_Block(empty, torch.cuda.Event(blocking=True)) for _ in range(NUM_BLOCKS)])

    def send(self, batches: list[Inputs]) -> Upload:
        """Start the copy of a step's micro-batches; waits for the one before the last."""
        starts, num_bytes = _places(batches)
        block = next(self._blocks)
        # the last copy from this block must be done before it is overwritten; an event without a record counts as done
        block.copied.synchronize()
        if block.memory_S.numel() < num_bytes:
            # grown, never shrunk: page-locking is slow, and the steps of a run are nearly of one size
            block.memory_S = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        host_S = block.memory_S[:num_bytes]
        for batch, views in zip(batches, _views(batches, host_S, starts), strict=True):
            for name, tensor in batch.items():
                views[name].copy_(tensor)
        with torch.cuda.stream(self._stream):
            # allocated under the copying stream: the caching allocator reuses memory in the order of the stream it
            # belongs to
            memory_S = torch.empty(num_bytes, dtype=torch.uint8, device=self._gpu)
            memory_S.copy_(host_S, non_blocking=True)
            block.copied = torch.cuda.Event(blocking=True)  # the last one's is still in the hands of who computes
            block.copied.record(self._stream)
        return Upload(_views(batches, memory_S, starts), memory_S, block.copied)


def _places(batches: list[Inputs]) -> tuple[list[int], int]:
    """Return the first byte of each tensor, batch after batch, and the bytes of all."""
    sizes = [tensor.numel() * tensor.element_size() for batch in batches for tensor in batch.values()]
    # tensors of 10 and 300 bytes begin at 0 and 256, and all end at 768
    padded = [math.ceil(size / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]
    *starts, end = itertools.accumulate(padded, initial=0)
    return starts, end


def _views(batches: list[Inputs], memory_S: torch.Tensor, starts: list[int]) -> list[Inputs]:
    """Return views of `memory_S` (uint8) with the names, shapes and types of the batches' tensors."""
    places = iter(starts)

    def view(tensor: torch.Tensor) -> torch.Tensor:
        bytes_S = memory_S.narrow(0, next(places), tensor.numel() * tensor.element_size())
        return bytes_S.view(tensor.dtype).view(tensor.shape)

    return [{name: view(tensor) for name, tensor in batch.items()} for batch in batches]
