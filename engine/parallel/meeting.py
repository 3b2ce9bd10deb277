"""Comparison of the facts that all ranks of a world must share, before anything is built.

Every rank compares its facts with rank 0's through the store where they meet, before there is a process group: ranks of
two starts at one port, of other library versions or of another world would otherwise wait for each other inside of a
library. A rank that differs reports it in the store; rank 0 collects the reports and publishes them, and all ranks end
with the same error. Facts known only later (the data) are compared over the world's group, by `agree_over`.

Keys of the store: `arrived/R` (counter per rank), `facts` (rank 0's), `gpu/UUID` (its first rank), `differ` (number of
reports), `differs/N` (a report), `compared` (ranks that are through), `found` (all reports), `heard` (ranks told).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from engine.errors import ConfigError, EnvironmentProblem
from engine.parallel import collectives
from engine.parallel.groups import Group

Facts = Mapping[str, Any]
"""JSON values by name: a description in words, or the key of a configuration."""
POLL_SECONDS = 0.05
"""Seconds between two looks into the store."""
SETTLE_SECONDS = 2.0
"""Seconds that rank 0 waits for further reports once there is one, and for the others to read the result."""
SHOWN = 20
"""Lines of differences that an error shows at most."""
_ABSENT = "nothing"


class Disagreement(ConfigError):
    """Ranks of one world were started differently; the error is the same on each of them."""


class Store(Protocol):
    """The part of `torch.distributed.Store` in use; `get` waits until there is a value."""

    def get(self, key: str, /) -> bytes: ...
    def set(self, key: str, value: str, /) -> None: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


def agree(store: Store, global_rank: int, world_size: int, facts: Facts, limit_seconds: float, gpu: str = "") -> None:
    """Compare `facts` with rank 0's; `gpu` names the GPU that this rank alone may use. Collective over the world.

    Raises:
        Disagreement: ranks differ, or two use one GPU; the same on every rank.
        EnvironmentProblem: this rank is there already, or some have not come after `limit_seconds`.
    """
    # `add` is atomic and returns the new value: of two starts at one port the second finds 2.
    if store.add(f"arrived/{global_rank}", 1) > 1:
        raise EnvironmentProblem(
            f"rank {global_rank} of {world_size} has met the others already: another start meets at the same place",
            "a port of its own for each start",
            "end the other start, or give this one another MASTER_PORT",
        )
    # Through JSON and back, as rank 0's facts come: a tuple would differ from the list that it becomes.
    own = json.loads(json.dumps(dict(facts)))
    if global_rank == 0:
        store.set("facts", json.dumps(own))
    differences = compare(own, json.loads(store.get("facts")))
    # The first rank to name a GPU gets its own number back, any later one that of the first.
    if gpu and (first := int(store.compare_set(f"gpu/{gpu}", "", str(global_rank)))) != global_rank:
        differences.append((f"GPU {gpu} of rank {first}", "used", "used, too"))
    if differences:
        # Reported before "compared": once that counter is full, every report is there.
        store.set(f"differs/{store.add('differ', 1)}", json.dumps([global_rank, differences]))
    store.add("compared", 1)
    if global_rank == 0:
        store.set("found", json.dumps(_collect(store, world_size, limit_seconds)))
    found = json.loads(store.get("found"))
    if found:
        store.add("heard", 1)
        # Rank 0's process may host the store: it stays until the others have read the result, or gave up.
        if global_rank == 0:
            _wait(lambda: store.add("heard", 0) >= store.add("compared", 0), SETTLE_SECONDS)
        raise told(found)


def agree_over(group: Group, facts: Facts) -> None:
    """Compare `facts` with those of the group's first rank. Collective over `group`.

    Raises:
        Disagreement: ranks differ; the same on every rank.
    """
    everyones = collectives.gather_objects(json.loads(json.dumps(dict(facts))), group)
    compared = [(rank, compare(own, everyones[0])) for rank, own in zip(group.ranks, everyones, strict=True)]
    if found := [(rank, differences) for rank, differences in compared if differences]:
        raise told(found)


def compare(own: Facts, first: Facts) -> list[tuple[str, Any, Any]]:
    """Return (name, rank 0's value, this rank's) of all facts that differ, sorted by name."""
    names = sorted(own.keys() | first.keys())
    pairs = [(name, first.get(name, _ABSENT), own.get(name, _ABSENT)) for name in names]
    return [(name, theirs, value) for name, theirs, value in pairs if theirs != value]


def told(found: list[tuple[int, list[tuple[str, Any, Any]]]]) -> Disagreement:
    """Make the error that names the ranks that differ from rank 0, with both values of each fact."""
    # Ranks with the same difference share a line: a thousand ranks of another version are one.
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for global_rank, differences in sorted(found):
        for name, first, own in differences:
            ranks.setdefault((name, _shown(first), _shown(own)), []).append(global_rank)
    lines = [
        f"{name}: {first} on rank 0, {own} on rank{'s' if len(held) > 1 else ''} {', '.join(map(str, held))}"
        if not name.startswith("GPU ")
        else f"{name} is used by rank {', '.join(map(str, held))}, too"
        for (name, first, own), held in ranks.items()
    ]
    shown = lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
    return Disagreement(
        "ranks of one world were started differently:\n  " + "\n  ".join(shown),
        "one job, step, attempt, world, run folder, configuration, data and installation, and a GPU for each rank",
        "start all ranks by one command in one place; two starts at a time need different MASTER_PORTs",
    )


def _collect(store: Store, world_size: int, limit_seconds: float) -> list[Any]:
    """Collect the reports on rank 0: those of all ranks, or those that come soon after the first one."""

    def all_compared() -> bool:
        return store.add("compared", 0) >= world_size

    # Adding 0 reads a counter without waiting for it to exist, which `get` would do.
    _wait(lambda: all_compared() or store.add("differ", 0) > 0, limit_seconds)
    count = store.add("differ", 0)
    if count:
        _wait(all_compared, SETTLE_SECONDS)
        return [json.loads(store.get(f"differs/{number}")) for number in range(1, store.add("differ", 0) + 1)]
    if not all_compared():
        missing = [rank for rank in range(world_size) if store.add(f"arrived/{rank}", 0) == 0]
        raise EnvironmentProblem(
            f"ranks {', '.join(map(str, missing))} of {world_size} have not come after {limit_seconds:.0f} s",
            "all ranks within launch.collective_limit_seconds",
            "look at what they said, and whether they reach rank 0's host and port",
        )
    return []


def _wait(until: Any, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
