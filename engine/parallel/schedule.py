"""Pipeline schedules as generators of instructions: the passes of one stage, in order, for a step's micro-batches.

Pure: no tensor, no communicator. A stage owns `num_chunks` chunks; chunk c of stage s is number c * num_stages + s in
the model, so that the last stage hands its chunk c's output to the first stage's chunk c + 1 (Narayanan et al. 2021,
section 2.2). An instruction carries its chunk and micro-batch. All stages run forward passes in one order and backward
passes in one order, so that messages between two stages are received in the order in which they are sent.

1F1B on 2 stages with 3 micro-batches: stage 0 runs F0 F1 B0 F2 B1 B2, stage 1 runs F0 B0 F1 B1 F2 B2. Under ZB-H1
stage 1 runs F0 B0 F1 B1 W0 F2 B2 W1 W2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True)
class BackwardInput:
    """Run the part of the backward pass that other stages wait for; defer the gradients of linear layers' weights."""

    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class BackwardWeight:
    """Compute the gradients that `BackwardInput` deferred; nothing is received or sent."""

    chunk: int
    micro_batch: int


Instruction = Forward | Backward | BackwardInput | BackwardWeight
Schedule = Literal["1f1b", "gpipe", "zb-h1"]
Pass = tuple[int, int]
"""(chunk, micro-batch)."""


def instructions(
    schedule: Schedule, stage: int, num_stages: int, num_chunks: int, num_micro_batches: int
) -> Iterator[Instruction]:
    """Yield the instructions of `stage` (of `num_stages`) for one step."""
    if schedule == "zb-h1":
        return _zero_bubble(stage, num_stages, num_micro_batches)
    forwards = list(forward_passes(num_stages, num_chunks, num_micro_batches))
    if schedule == "gpipe":  # the warm-up is everything, so no backward begins before the last forward
        return _alternate(forwards, backward_passes(num_stages, num_chunks, num_micro_batches), len(forwards))
    if num_chunks == 1:  # with one chunk both directions have one order, 0, 1, 2, ...
        return _alternate(forwards, forwards, num_stages - 1 - stage)
    return _interleaved(stage, num_stages, num_chunks, num_micro_batches)


def forward_only(num_stages: int, num_chunks: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield the instructions of every stage for an evaluation."""
    return (Forward(*one) for one in forward_passes(num_stages, num_chunks, num_micro_batches))


def forward_passes(num_stages: int, num_chunks: int, num_micro_batches: int) -> Iterator[Pass]:
    """Yield the forward passes in the order of every stage: micro-batches in groups of `num_stages`, chunk by chunk."""
    # 2 stages, 2 chunks, 3 micro-batches: (0, 0) (0, 1) (1, 0) (1, 1), then (0, 2) (1, 2). In groups of that size the
    # first stage is free for a micro-batch's next chunk just when its hidden states come round.
    for first in range(0, num_micro_batches, num_stages):
        group = range(first, min(first + num_stages, num_micro_batches))
        yield from ((chunk, micro_batch) for chunk in range(num_chunks) for micro_batch in group)


def backward_passes(num_stages: int, num_chunks: int, num_micro_batches: int) -> Iterator[Pass]:
    """Yield the backward passes in the order of every stage: the same groups, from the last chunk to the first."""
    for chunk, micro_batch in forward_passes(num_stages, num_chunks, num_micro_batches):
        yield num_chunks - 1 - chunk, micro_batch


def _alternate(forwards: Iterable[Pass], backwards: Iterable[Pass], warmup: int) -> Iterator[Instruction]:
    """Yield `warmup` forwards, then one forward and one backward in turn, then the backwards that are left.

    With one chunk it is 1F1B (Narayanan et al. 2019, PipeDream-Flush) where a stage warms up by as many micro-batches
    as stages follow it, and GPipe (Huang et al. 2019) where all forwards are in the warm-up. At most `warmup` + 1
    forward passes are alive.
    """
    left = iter(backwards)
    for number, one in enumerate(forwards):
        yield Forward(*one)
        if number >= warmup:
            yield Backward(*next(left))
    yield from (Backward(*one) for one in left)


def _interleaved(stage: int, num_stages: int, num_chunks: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield interleaved 1F1B (Narayanan et al. 2021, section 2.2) for any number of micro-batches.

    The published order wants a multiple of the stages. Others are filled up with micro-batches whose instructions
    are left out again: what is left keeps its order and needs nothing of what was left out.
    """
    filled = -(-num_micro_batches // num_stages) * num_stages  # 5 micro-batches on 4 stages are filled up to 8
    sizes = (num_stages, num_chunks, filled)
    # (num_chunks - 1) rounds over all stages until a micro-batch is in its last chunk, then two passes for each stage
    # behind this one: a micro-batch's way there and its gradient's way back.
    warmup = 2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages
    for instruction in _alternate(forward_passes(*sizes), backward_passes(*sizes), warmup):
        if instruction.micro_batch < num_micro_batches:
            yield instruction


def _zero_bubble(stage: int, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield ZB-H1 (Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2.3): 1F1B with split backward passes.

    Stage s lags s micro-batches behind with weight gradients, and so has something to do while it waits for the
    gradients of its last micro-batches. What it holds for them makes up for the shorter warm-up of later stages: every
    stage holds at most as many micro-batches as there are stages, as the first one does in 1F1B.
    """
    # The last stage warms up by nothing and defers its first weight gradient by num_stages - 1 micro-batches; the
    # first one does the opposite.
    warmup = min(num_stages - 1 - stage, num_micro_batches)
    yield from (Forward(0, number) for number in range(warmup))
    for number in range(num_micro_batches):
        if number + warmup < num_micro_batches:
            yield Forward(0, number + warmup)
        yield BackwardInput(0, number)
        if number >= stage:
            yield BackwardWeight(0, number - stage)
    yield from (BackwardWeight(0, number) for number in range(max(num_micro_batches - stage, 0), num_micro_batches))
