"""Process groups as a value: the ranks that this rank communicates with along each axis, and their communicators.

Nothing here is global: `connect` meets the other ranks, `join` makes the groups, once per process, and code that needs
one receives it. A collective over a group of one rank is free and works without `torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import Layout
from engine.config.schema.run import LaunchConfig
from engine.errors import EnvironmentProblem
from engine.parallel.attempts import agree_on_attempt
from engine.parallel.axes import Axis, Coordinates, Grid

LIMIT_SECONDS = LaunchConfig().collective_limit_seconds
"""The default of `launch.collective_limit_seconds`, after which a collective that not all ranks reach is an error."""


@dataclass(frozen=True)
class Group:
    """Some ranks of the world in ascending order, and this rank's position among them."""

    ranks: tuple[int, ...]
    position: int
    handle: Any = None
    """The `torch.distributed` process group; may be None where the group is this rank alone."""

    @property
    def size(self) -> int:
        return len(self.ranks)


ALONE = Group(ranks=(0,), position=0)
"""A world of one rank."""


@dataclass(frozen=True)
class Groups:
    """Every group of one rank. Groups named after an axis hold the ranks that differ on that axis alone."""

    layout: Layout
    grid: Grid
    global_rank: int
    coordinates: Coordinates
    world: Group
    zero: Group
    """Data x sequence: the ranks that ZeRO shards over, since all of them hold the same weights."""
    near: Group | None
    """The neighbours in `zero` that keep a second copy of its weights between them (`gather_within`), if any do."""
    sequence: Group
    tensor: Group
    pipe: Group
    pipe_backward: Group
    """The ranks of `pipe` with a communicator of their own: gradients travel on it, activations on `pipe`, so that
    neither waits for the other."""
    wrap: Group
    wrap_backward: Group
    """The ranks of `pipe` once more: activations from the last stage to the first one's next chunk, and their
    gradients. These have communicators of their own because with two stages they join the same two ranks as `pipe`.
    With one chunk per stage they are `pipe` and `pipe_backward`, and are not used."""
    model: Group
    """Pipe x tensor: the ranks that hold one copy of the model together."""
    ties: dict[tuple[int, ...], Group]
    """Group of each set of stages that hold a tied weight: their ranks at this rank's position on the other axes.
    Only sets that this rank's stage belongs to."""

    @property
    def is_first_stage(self) -> bool:
        return self.coordinates.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.stage == self.layout.pipe - 1


def connect(
    environment: RankEnvironment,
    device: torch.device,
    store: Any = None,
    limit_seconds: float = LIMIT_SECONDS,
    agree: Callable[[Any], None] = lambda store: None,
) -> None:
    """Meet the other ranks and make the default process group (NCCL on CUDA, else gloo). Collective over the world.

    Without a `store` the ranks meet at the address and port of `environment`; a world of one needs none. `agree` is
    called with the store before the group is made.

    Raises:
        EnvironmentProblem: the ranks did not all arrive.
    """
    # Gloo would take the interface that the host name resolves to, which need not be reachable.
    if environment.master_addr in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=limit_seconds)
    try:
        store = store if store is not None else _store(environment, limit)
        store.set_timeout(limit)
        # torchrun's store outlives a restart of its workers: a prefix per attempt hides the keys of the last one.
        own = _within(f"palimpsest/{environment.attempt}", store)
        agree(own)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=_within("default_pg", own),
            rank=environment.global_rank,
            world_size=environment.world_size,
            timeout=limit,
        )
    except (RuntimeError, ValueError) as error:
        raise _unreachable(environment, error) from error


def attempt_under_torchrun(environment: RankEnvironment, least: int, limit_seconds: float = LIMIT_SECONDS) -> int:
    """Return the number of this attempt, on which the ranks of a torchrun agree (`engine.parallel.attempts`).

    Collective over the world.

    Raises:
        EnvironmentProblem: the ranks did not all arrive.
    """
    if environment.world_size == 1:
        return least
    limit = timedelta(seconds=limit_seconds)
    try:
        store = _store(environment, limit)
        store.set_timeout(limit)
        given = (environment.global_rank, environment.world_size, least, limit_seconds)
        return agree_on_attempt(_within("palimpsest/attempts", store), *given)
    except (RuntimeError, ValueError) as error:
        raise _unreachable(environment, error) from error


def _unreachable(environment: RankEnvironment, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"rank {environment.global_rank} of {environment.world_size} could not meet the others at "
        f"{environment.master_addr}:{environment.master_port}: {error}",
        "all ranks reach that host and port",
        "check the address, the port and the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
    )


def _store(environment: RankEnvironment, limit: timedelta) -> Any:
    """Return the store where the ranks meet: rank 0 opens it at the address in the environment, or torchrun's agent."""
    if environment.world_size == 1:
        # In memory: several runs of one rank on a machine need no port each.
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    meeting = dist.rendezvous(  # pyright: ignore[reportPrivateImportUsage]
        "env://", environment.global_rank, environment.world_size, timeout=limit
    )
    store, _, _ = next(iter(meeting))
    return store


def _within(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]


def disconnect() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(
    layout: Layout,
    global_rank: int,
    tied_stages: Iterable[tuple[int, ...]] = (),
    chunks_per_stage: int = 1,
    gather_within: int | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> Groups:
    """Make all groups of the layout. Collective over the world, after `connect`.

    `tied_stages` are the sets of stages that hold a weight together (`engine.plan.cut.tied_stages`), `chunks_per_stage`
    the chunks of each stage, `gather_within` the ranks of a second copy of ZeRO-3's weights, `limit_seconds` what a
    collective of a group may take.

    Every rank makes every group in the same order, as `torch.distributed.new_group` requires.
    """
    grid = Grid(layout)
    make = partial(_make, global_rank=global_rank, limit_seconds=limit_seconds)

    def mine(*axes: Axis) -> Group:
        return make(grid.groups(*axes))

    pipe_lines = grid.groups("pipe")
    ties = [
        (stages, make([[line[stage] for stage in stages] for line in pipe_lines], strict=False))
        for stages in sorted(set(tied_stages))
    ]
    near = None
    if gather_within is not None:
        # The ZeRO group (0, 2, 4, 6) with gather_within 2 gives (0, 2) and (4, 6): neighbours in it, not in the world.
        lines = grid.groups("data", "sequence")
        cuts = range(0, len(lines[0]), gather_within)
        near = make([line[first : first + gather_within] for line in lines for first in cuts])
    # Each call makes communicators of its own, also for ranks that have some already.
    pipe, pipe_backward = make(pipe_lines), make(pipe_lines)
    wrap, wrap_backward = pipe, pipe_backward
    if chunks_per_stage > 1:
        wrap, wrap_backward = make(pipe_lines), make(pipe_lines)
    return Groups(
        layout=layout,
        grid=grid,
        global_rank=global_rank,
        coordinates=grid.coordinates(global_rank),
        world=Group(tuple(range(layout.world_size)), global_rank, dist.group.WORLD),
        zero=mine("data", "sequence"),
        near=near,
        sequence=mine("sequence"),
        tensor=mine("tensor"),
        pipe=pipe,
        pipe_backward=pipe_backward,
        wrap=wrap,
        wrap_backward=wrap_backward,
        model=mine("pipe", "tensor"),
        ties={stages: group for stages, group in ties if group is not None},
    )


def join_lines(
    lines: Iterable[tuple[int, ...]], global_rank: int, limit_seconds: float = LIMIT_SECONDS
) -> list[Group | None]:
    """Make groups for tensors in host memory (gloo, whatever the world's backend), in the order given.

    None for those that this rank is not in. Collective over the world, after `connect`.
    """
    groups = []
    for line in lines:
        ranks = tuple(sorted(line))
        handle = dist.new_group(list(ranks), timeout=timedelta(seconds=limit_seconds), backend="gloo")
        groups.append(Group(ranks, ranks.index(global_rank), handle) if global_rank in ranks else None)
    return groups


def _make(families: list[list[int]], global_rank: int, limit_seconds: float, strict: bool = True) -> Any:
    """Return the group of `families` that holds this rank. All of them are made, also single ranks (for DeepSpeed).

    With `strict` False the rank may be in none of them, and None is returned.
    """
    own = None
    for ranks in families:
        handle = dist.new_group(ranks, timeout=timedelta(seconds=limit_seconds))
        if global_rank in ranks:
            own = Group(tuple(ranks), ranks.index(global_rank), handle)
    assert own is not None or not strict
    return own
