"""Ranks as threads of one process, with collectives that pass pickled objects over barriers.

Enough to run the collective functions of the checkpoint on any layout within milliseconds, errors of single ranks
included: a rank that raised alone would break the barrier and fail the test.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.parallel import collectives
from engine.parallel.groups import Group

PATIENCE_SECONDS = 30.0


@dataclass
class _Work:
    """A message under way."""

    wait: Callable[[], Any]


class ThreadedRanks:
    """Runs a function once per rank, with `engine.parallel.collectives` replaced for as long."""

    def __init__(self, monkeypatch: Any) -> None:
        self._slots: dict[tuple[int, ...], list[bytes]] = {}
        self._barriers: dict[tuple[int, ...], threading.Barrier] = {}
        self._lock = threading.Lock()
        monkeypatch.setattr(collectives, "gather_objects", self.gather_objects)
        monkeypatch.setattr(collectives, "broadcast_object", self.broadcast_object)
        self._messages: dict[tuple[int, ...], queue.SimpleQueue[Any]] = {}
        monkeypatch.setattr(collectives, "send", self.send)
        monkeypatch.setattr(collectives, "start_receiving", self.start_receiving)

    def run(self, world_size: int, function: Callable[[int], Any]) -> list[Any]:
        """What `function(global_rank)` returned, or the exception that it raised, per rank."""
        results: list[Any] = [None] * world_size

        def one(global_rank: int) -> None:
            try:
                results[global_rank] = function(global_rank)
            except Exception as error:
                results[global_rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def gather_objects(self, value: Any, group: Group) -> list[Any]:
        with self._lock:
            slots = self._slots.setdefault(group.ranks, [b""] * group.size)
            barrier = self._barriers.setdefault(group.ranks, threading.Barrier(group.size, timeout=PATIENCE_SECONDS))
        slots[group.position] = pickle.dumps(value)
        barrier.wait()
        values = [pickle.loads(slot) for slot in slots]
        barrier.wait()
        return values

    def send(self, tensor: Any, group: Group, position: int) -> _Work:
        self._between(group, group.position, position).put(tensor.clone())
        return _Work(lambda: None)

    def start_receiving(self, tensor: Any, group: Group, position: int) -> _Work:
        messages = self._between(group, position, group.position)
        return _Work(lambda: tensor.copy_(messages.get(timeout=PATIENCE_SECONDS)))

    def _between(self, group: Group, source: int, target: int) -> queue.SimpleQueue[Any]:
        with self._lock:
            return self._messages.setdefault((*group.ranks, source, target), queue.SimpleQueue())

    def broadcast_object(self, value: Any, group: Group, source: int = 0) -> Any:
        return self.gather_objects(value if group.position == source else None, group)[source]
