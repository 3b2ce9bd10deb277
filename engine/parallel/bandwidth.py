"""Bandwidth of the network between the nodes of a world, measured before a run starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from engine.parallel import collectives
from engine.parallel.groups import Group

ROUNDS = 3
"""Measurements of a pair, of which the fastest counts: the first one opens the connections."""


def pairings(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs of `count` members, so that every two members meet once, and each is once in a round.

    The circle method of tournaments: member 0 stays, the others move on by one place. Four members:
    (0, 3) (1, 2); (0, 2) (3, 1); (0, 1) (2, 3).
    """
    members: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(members) - 1):
        half = len(members) // 2
        pairs = zip(members[:half], reversed(members[half:]), strict=True)
        # With an odd number the one that is paired with nobody rests.
        rounds.append([(first, second) for first, second in pairs if first is not None and second is not None])
        members = [members[0], members[-1], *members[1:-1]]
    return rounds


def pair_bandwidths(firsts: Sequence[int], world: Group, device: torch.device, num_bytes: int) -> dict[str, float]:
    """Return the bandwidth between the first ranks of every two nodes, in bytes per second and direction.

    `firsts` are positions in `world`, one per node; keys are "I-J", numbers of nodes, I < J. Pairs of one round are
    measured at once, as a ring of all nodes would use the network. Collective over `world`; the same on every rank.
    """
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    own = firsts.index(world.position) if world.position in firsts else None
    found: dict[str, float] = {}
    for pairs in pairings(len(firsts)):
        partner = next((sum(pair) - own for pair in pairs if own is not None and own in pair), None)
        best = float("inf")
        for _ in range(ROUNDS):
            collectives.barrier(world)
            if partner is None:
                continue
            begin = time.perf_counter()
            # Both directions at once; the receive is posted first, so that neither waits for the other's buffer.
            works = [collectives.start_receiving(received, world, firsts[partner])]
            works.append(collectives.send(sent, world, firsts[partner]))
            for work in works:
                work.wait()
            _wait_for(device)
            best = min(best, time.perf_counter() - begin)
        if own is not None and partner is not None and own < partner:
            found[f"{own}-{partner}"] = num_bytes / best
    return {pair: value for part in collectives.gather_objects(found, world) for pair, value in part.items()}


def all_reduce_bandwidth(world: Group, device: torch.device, num_bytes: int) -> float:
    """Return the bus bandwidth of an all-reduce over `world`, in bytes per second. Collective over `world`.

    2 (n - 1) / n of the bytes pass each rank's link, whatever the algorithm (NCCL tests' definition).
    """
    values = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        collectives.barrier(world)
        begin = time.perf_counter()
        collectives.all_reduce(values, world)
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    slowest = max(collectives.gather_objects(best, world))
    return 2 * (world.size - 1) / world.size * num_bytes / slowest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
