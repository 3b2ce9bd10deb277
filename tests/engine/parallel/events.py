"""Two simulations of a pipeline that know instructions and nothing of how they were ordered.

`timeline`: a stage does one thing at a time, waits for what it receives, and sends without waiting. `rendezvous`: each
communicator of a rank does one transfer at a time, in the order in which they were asked for, and a send is over when
it has been received, as large messages of NCCL; computing waits for receives and for no send.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.parallel.schedule import Backward, BackwardInput, Forward, Instruction

Orders = Sequence[Sequence[Instruction]]
"""Instructions of each stage."""
Channel = tuple[str, int, int]
"""(communicator, source, target)."""
Message = tuple[type[Instruction], int, int]
"""What made it: kind, part of the model, micro-batch."""


@dataclass(frozen=True)
class Transfers:
    """What an instruction receives first and sends afterwards."""

    received: list[tuple[Channel, Message]]
    sent: list[tuple[Channel, Message]]


def transfers(instruction: Instruction, stage: int, num_stages: int, num_chunks: int) -> Transfers:
    """From the definition: part c * p + s of the model stands on stage s, activations go up and gradients down."""
    part, last = instruction.chunk * num_stages + stage, num_stages * num_chunks - 1
    ahead, behind = (stage + 1) % num_stages, (stage - 1) % num_stages
    ahead_way = "wrap" if ahead == 0 else "pipe"
    behind_way = "wrap" if stage == 0 else "pipe"
    number = instruction.micro_batch
    received, sent = [], []
    if isinstance(instruction, Forward):
        if part > 0:
            received.append(((behind_way, behind, stage), (Forward, part - 1, number)))
        if part < last:
            sent.append(((ahead_way, stage, ahead), (Forward, part, number)))
    elif isinstance(instruction, Backward | BackwardInput):
        if part < last:
            received.append(((f"{ahead_way}_backward", ahead, stage), (Backward, part + 1, number)))
        if part > 0:
            sent.append(((f"{behind_way}_backward", stage, behind), (Backward, part, number)))
    return Transfers(received, sent)


@dataclass
class Timeline:
    """`ends[stage]` is when each instruction of a stage is over."""

    ends: list[list[int]]
    length: int


def timeline(orders: Orders, num_chunks: int, cost: Callable[[Instruction], int]) -> Timeline:
    """Runs the orders; fails where nobody can go on, or where a message is not the one that is received."""
    num_stages = len(orders)
    ends: list[list[int]] = [[] for _ in orders]
    channels: dict[Channel, deque[tuple[Message, int]]] = defaultdict(deque)
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            if len(ends[stage]) == len(order):
                continue
            instruction = order[len(ends[stage])]
            needed = transfers(instruction, stage, num_stages, num_chunks)
            if any(not channels[channel] for channel, _ in needed.received):
                continue
            start = ends[stage][-1] if ends[stage] else 0
            for channel, expected in needed.received:
                message, sent_at = channels[channel].popleft()
                assert message == expected, f"stage {stage} receives {message} in the place of {expected}"
                start = max(start, sent_at)
            ends[stage].append(start + cost(instruction))
            for channel, message in needed.sent:
                channels[channel].append((message, ends[stage][-1]))
            moved = True
    assert [len(one) for one in ends] == [len(order) for order in orders], "deadlock"
    assert not any(channels.values()), "sent and never received"
    return Timeline(ends, max(one[-1] for one in ends))


def rendezvous(orders: Orders, num_chunks: int) -> None:
    """Runs the orders; fails where nobody can go on."""
    num_stages = len(orders)
    asked: dict[tuple[str, int], deque[tuple[Channel, Message]]] = defaultdict(deque)
    done, waiting, arrived = [0] * num_stages, [False] * num_stages, [0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while done[stage] < len(order):
                now = transfers(order[done[stage]], stage, num_stages, num_chunks)
                if not waiting[stage]:
                    for channel, message in now.received:
                        asked[channel[0], stage].append((channel, message))
                    waiting[stage], arrived[stage] = True, 0
                if arrived[stage] < len(now.received):
                    break
                for channel, message in now.sent:
                    asked[channel[0], stage].append((channel, message))
                done[stage], waiting[stage], moved = done[stage] + 1, False, True
        for (way, stage), queue in list(asked.items()):
            if queue and queue[0][0][1] == stage:  # a send at the head
                (channel, message), others = queue[0], asked[way, queue[0][0][2]]
                if others and others[0][0] == channel:
                    assert others[0][1] == message
                    queue.popleft()
                    others.popleft()
                    arrived[channel[2]] += 1
                    moved = True
    assert done == [len(order) for order in orders], "deadlock"
    assert not any(asked.values()), "sent and never received"
