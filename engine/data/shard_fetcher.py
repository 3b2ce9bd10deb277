"""Fetches the shards that are coming into use, in threads of their own.

The order of samples says which they are long before they are read. All ranks of a node want the same ones; a shard
that another is fetching is passed over, so they share the work. Trouble is not told here: who reads the shard meets it.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread

from engine.data.shards.dataset import TokenDataset
from engine.errors import PalimpsestError
from engine.logs import logger

THREADS = 4
Item = tuple[TokenDataset, int]
_log = logger(__name__)


class ShardFetcher:
    """Threads that fetch wanted shards; they begin with the first call of `want`."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._pending: deque[Item] = deque()
        self._known: set[tuple[int, int]] = set()
        self._closed = False
        self._threads: list[Thread] = []

    def want(self, items: list[Item]) -> None:
        """Fetch these shards, in this order; those that are not wanted any more are given up."""
        keys = [(id(dataset), number) for dataset, number in items]
        with self._changed:
            waiting = {(id(dataset), number) for dataset, number in self._pending}
            new = [item for item, key in zip(items, keys, strict=True) if key not in self._known or key in waiting]
            self._pending, self._known = deque(new), set(keys)
            if new and not self._threads:
                self._threads = [Thread(target=self._work, name="fetch ahead", daemon=True) for _ in range(THREADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, each after the file that it is at; does not wait for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending)
                if self._closed:
                    return
                dataset, number = self._pending.popleft()
            try:
                dataset.fetch_ahead(number)
            except PalimpsestError as error:
                _log.debug("not fetched ahead: %s", error)
