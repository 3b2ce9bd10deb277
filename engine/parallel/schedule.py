"""Pipeline schedules as generators of instructions: what one stage does, in order, for the micro-batches of a step.

Pure: no tensor, no communicator. An instruction carries the chunk and the micro-batch it is about; a stage owns one
chunk for now. Backward passes are whole here; a schedule that splits them adds instructions, not a new executor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Forward:
    """Run the forward pass: receive the input unless first, send the output unless last."""

    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Backward:
    """Run the backward pass: receive the output's gradient unless last, send the input's unless first."""

    chunk: int
    micro_batch: int


Instruction = Forward | Backward
Schedule = Literal["1f1b", "gpipe"]


def instructions(schedule: Schedule, stage: int, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """What `stage` of `num_stages` does for one step."""
    warmup = num_micro_batches if schedule == "gpipe" else min(num_stages - 1 - stage, num_micro_batches)
    return _one_forward_one_backward(warmup, num_micro_batches)


def forward_only(num_micro_batches: int) -> Iterator[Instruction]:
    """What every stage does to evaluate."""
    return (Forward(0, micro_batch) for micro_batch in range(num_micro_batches))


def _one_forward_one_backward(warmup: int, num_micro_batches: int) -> Iterator[Instruction]:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): `warmup` forwards, then pairs, then the backwards left.

    A stage holds the activations of at most `warmup` + 1 micro-batches. With all forwards in the warm-up it is
    GPipe (Huang et al. 2019).
    """
    for micro_batch in range(warmup):
        yield Forward(0, micro_batch)
    for micro_batch in range(warmup, num_micro_batches):
        yield Forward(0, micro_batch)
        yield Backward(0, micro_batch - warmup)
    for micro_batch in range(num_micro_batches - warmup, num_micro_batches):
        yield Backward(0, micro_batch)
