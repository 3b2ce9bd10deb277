"""Runs measured instructions of a pipeline again as a discrete-event simulation: each stage on a machine of its own.

Processes that share cores wait for each other's cores as well as for each other's messages, so their wall time says
little about a schedule. The CPU time of each instruction does not know of that: put one behind the other, each begun
when its stage is free and what it receives has been made, they give the step that stages with cores of their own would
have, with messages that take no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from engine.parallel.schedule import Backward, BackwardInput, Forward, Instruction

Spans = Sequence[tuple[Instruction, float]]
"""What a stage did, in order, with the seconds that each took."""


@dataclass(frozen=True)
class Replayed:
    """A step: seconds from its begin to its end, and those that each stage was busy."""

    length: float
    busy: tuple[float, ...]

    @property
    def idle_share(self) -> float:
        """Of all stages' time."""
        return 1 - sum(self.busy) / (len(self.busy) * self.length)


def replay(stages: Sequence[Spans], num_chunks: int) -> Replayed:
    """The step that these spans give. Chunk c of stage s is part c * stages + s of the model."""
    last = len(stages) * num_chunks - 1
    ends: dict[tuple[bool, int, int], float] = {}
    """By whether it went forward, part and micro-batch."""
    clocks, done = [0.0] * len(stages), [0] * len(stages)
    moved = True
    while moved:
        moved = False
        for stage, spans in enumerate(stages):
            while done[stage] < len(spans):
                instruction, seconds = spans[done[stage]]
                part = instruction.chunk * len(stages) + stage
                forward = isinstance(instruction, Forward)
                sends = forward or isinstance(instruction, Backward | BackwardInput)
                needed = None
                if sends and part != (0 if forward else last):
                    needed = (forward, part - 1 if forward else part + 1, instruction.micro_batch)
                if needed is not None and needed not in ends:
                    break
                clocks[stage] = max(clocks[stage], ends[needed] if needed is not None else 0.0) + seconds
                if sends:
                    ends[forward, part, instruction.micro_batch] = clocks[stage]
                done[stage], moved = done[stage] + 1, True
    assert done == [len(spans) for spans in stages], "deadlock"
    return Replayed(max(clocks), tuple(sum(seconds for _, seconds in spans) for spans in stages))


def levelled(stages: Sequence[Spans]) -> list[Spans]:
    """The same instructions, each as long as those of its kind are on average: stages that are alike."""
    kinds: dict[type[Instruction], list[float]] = {}
    for instruction, seconds in (span for spans in stages for span in spans):
        kinds.setdefault(type(instruction), []).append(seconds)
    means = {kind: mean(found) for kind, found in kinds.items()}
    return [[(instruction, means[type(instruction)]) for instruction, _ in spans] for spans in stages]
