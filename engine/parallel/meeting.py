"""What the ranks of a world must have in common, compared before anything is built (contract "Agreement").

Every rank compares its facts with rank 0's through the store where they meet, before there is a process group: ranks of
two starts at one port, of other library versions or of another world would otherwise wait for each other inside of a
library. Whoever differs says so in the store; rank 0 collects that and publishes it, and all ranks end with the same
error. What is known only later (the data) is compared over the world's group, by `agree_over`.
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
"""JSON values by what they are, in words or as the key of a configuration."""
POLL_SECONDS = 0.05
SETTLE_SECONDS = 2.0
"""How long rank 0 waits for others to say what they differ in, once one has."""
SHOWN = 20
"""Lines of differences that an error holds."""
_ABSENT = "nothing"


class Disagreement(ConfigError):
    """Ranks of one world were started differently; the error is the same on each of them."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`; `get` waits until there is a value."""

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
    if store.add(f"arrived/{global_rank}", 1) > 1:
        raise EnvironmentProblem(
            f"rank {global_rank} of {world_size} has met the others already: another start meets at the same place",
            "a port of its own for each start",
            "end the other start, or give this one another MASTER_PORT",
        )
    own = json.loads(json.dumps(dict(facts)))
    if global_rank == 0:
        store.set("facts", json.dumps(own))
    differences = compare(own, json.loads(store.get("facts")))
    if gpu and (first := int(store.compare_set(f"gpu/{gpu}", "", str(global_rank)))) != global_rank:
        differences.append((f"GPU {gpu} of rank {first}", "used", "used, too"))
    if differences:
        store.set(f"differs/{store.add('differ', 1)}", json.dumps([global_rank, differences]))
    store.add("compared", 1)
    if global_rank == 0:
        store.set("found", json.dumps(_collect(store, world_size, limit_seconds)))
    found = json.loads(store.get("found"))
    if found:
        store.add("heard", 1)
        if global_rank == 0:  # whose process may keep the store: it stays until the others have heard
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
    """(what, rank 0's value, this rank's) of all that differs, sorted."""
    names = sorted(own.keys() | first.keys())
    pairs = [(name, first.get(name, _ABSENT), own.get(name, _ABSENT)) for name in names]
    return [(name, theirs, value) for name, theirs, value in pairs if theirs != value]


def told(found: list[tuple[int, list[tuple[str, Any, Any]]]]) -> Disagreement:
    """The error that names which ranks differ from rank 0 in what, value against value."""
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
    """What the ranks have found, on rank 0: all of them, or those that come soon after one has found something."""

    def all_compared() -> bool:
        return store.add("compared", 0) >= world_size

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
