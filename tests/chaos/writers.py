"""Writers of plain tensors, as forked processes that save with the real `Saver` until one of them is killed.

`drive` runs in a process of its own, with torch loaded and no other thread, so that it may fork. It forks the ranks of
a small world and hands their collectives around as pickled objects: a hub over pipes in place of gloo, so that a
hundred kills take seconds. As a launcher does, it kills the others once one is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from engine.checkpoint.folder import committed, step_of
from engine.checkpoint.load import load_shards, open_checkpoint
from engine.checkpoint.retention import Retention, newest_whole, prune
from engine.checkpoint.saver import Saver
from engine.parallel import collectives
from engine.parallel.groups import Group
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

LAYOUTS = ((1, 3, 1), (2, 2, 1), (1, 1, 2), (1, 1, 1))
LONGEST_WAIT_SECONDS = 0.03
"""About as long as one save of this model takes on a quiet machine."""


@dataclass
class Kill:
    """What was there when a rank was killed, and what was left."""

    attempt: int
    begun: int
    """The newest step whose save had begun."""
    known: int
    """The newest step that some rank knew to be committed."""
    found: int
    """The newest checkpoint that verifies."""
    others: list[str]
    """Other names in the folder that are no checkpoint's."""


def drive(sender: Connection, folder: Path, kills: int, seed: int) -> None:
    """Kills a rank `kills` times and sends what was left each time, or an error."""
    import torch

    torch.set_num_threads(1)
    try:
        draw, found = random.Random(seed), 0
        for attempt in range(kills):
            kill = one_attempt(folder, attempt, found, LAYOUTS[attempt % len(LAYOUTS)], draw)
            check_content(folder, kill.found)
            sender.send(kill)
            found = kill.found
    except BaseException as error:
        sender.send(repr(error))
    sender.close()


def one_attempt(folder: Path, attempt: int, start: int, layout: tuple[int, int, int], draw: random.Random) -> Kill:
    """Ranks go on from step `start`, are killed during some save, and are gone when this returns."""
    world = World(layout_of(*layout), 3, small_model())
    size = world.layout.world_size
    pairs = [multiprocessing.Pipe() for _ in range(size)]
    children = [
        _fork(lambda rank=rank: _save_on(pairs[rank][1], world, rank, folder, attempt, start), pairs, rank)
        for rank in range(size)
    ]
    hub = _Hub([ours for ours, _ in pairs])
    fatal_save, victim = start + draw.randint(1, 3), draw.randrange(size)
    try:
        while hub.begun < fatal_save:
            hub.turn(10.0)
        until = time.monotonic() + draw.uniform(0.0, LONGEST_WAIT_SECONDS)
        while (left := until - time.monotonic()) > 0:
            hub.turn(left)
        os.kill(children[victim], 9)
        os.waitpid(children.pop(victim), 0)
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
    hub.drain()
    newest = newest_whole(committed(folder))
    others = sorted(path.name for path in folder.iterdir() if step_of(path) < 0)
    return Kill(attempt, hub.begun, hub.known, step_of(newest) if newest else -1, others)


def check_content(folder: Path, step: int) -> None:
    """The newest checkpoint holds, bit for bit, what its step had."""
    if step <= 0:
        return
    world = World(layout_of(1, 1, 1), 3, small_model())
    path = next(path for path in committed(folder) if step_of(path) == step)
    load_shards(path, open_checkpoint(path), world.shards[0])
    world.check(random_state(world.specs, step))


def _save_on(connection: Connection, world: World, rank: int, folder: Path, attempt: int, start: int) -> None:
    """One rank: a save after every step, as the training loop does it."""

    def gather(value: Any, group: Group) -> list[Any]:
        if group.size == 1:
            return [value]
        connection.send(("gather", group.ranks, value))
        return connection.recv()

    collectives.gather_objects = gather
    collectives.broadcast_object = lambda value, group, source=0: gather(value, group)[source]
    saver = Saver(folder, world.groups[rank], lambda path: prune(folder, Retention(2), path))
    saver.acquire("job", attempt)
    step = start
    while True:
        step += 1
        world.fill(random_state(world.specs, step))
        saver.begin(world.shards[rank], world.placements_of(rank), some_state(step), "job", attempt)
        connection.send(("begun", (), step))
        saver.hold_update()
        while saver.in_flight is not None:
            told = gather(saver.save_flags(), world.groups[rank].world)
            if saver.advance(*(sum(column) for column in zip(*told, strict=True))):
                connection.send(("committed", (), step))


class _Hub:
    """Answers the ranks' collectives and hears what they have done."""

    def __init__(self, connections: list[Any]) -> None:
        self.connections: Any = connections
        self.begun = self.known = 0
        self._waiting: dict[tuple[int, ...], dict[int, Any]] = {}

    def turn(self, seconds: float) -> None:
        """Hears whoever speaks within so many seconds."""
        for connection in cast(list[Any], wait(self.connections, timeout=seconds)):
            self._hear(self.connections.index(connection), connection.recv())

    def drain(self) -> None:
        """Hears what was said before the end."""
        for rank, connection in enumerate(self.connections):
            try:
                while connection.poll():
                    self._hear(rank, connection.recv())
            except (EOFError, OSError):
                continue

    def _hear(self, rank: int, message: tuple[str, tuple[int, ...], Any]) -> None:
        what, ranks, value = message
        if what == "begun":
            self.begun = max(self.begun, value)
        elif what == "committed":
            self.known = max(self.known, value)
        else:
            waiting = self._waiting.setdefault(ranks, {})
            waiting[rank] = value
            if len(waiting) == len(ranks):
                del self._waiting[ranks]
                for each in ranks:
                    self.connections[each].send([waiting[one] for one in ranks])


def _fork(body: Callable[[], None], pairs: list[tuple[Connection, Connection]], rank: int) -> int:
    child = os.fork()
    if child:
        pairs[rank][1].close()
        return child
    try:
        body()
    finally:
        os._exit(1)
