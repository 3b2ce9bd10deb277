"""Ranks that read, in a process of their own, step by step as a test lets them: so it may kill them where it likes."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import tests.distributed.ranks  # noqa: F401  # what its fork server loads
from engine.data.loader import Loader
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.remote import RemoteFolder
from engine.data.stream import Stream

State = dict[str, Any]
_server: Any = multiprocessing.get_context("forkserver")


class Ranks:
    """Some ranks of a world, from a state on or from the beginning; `loader` are a `Loader`'s arguments."""

    def __init__(
        self,
        location: str,
        ranks: list[int],
        world_size: int,
        state: State | None = None,
        cache: ShardCache | None = None,
        **loader: Any,
    ) -> None:
        self._connection, theirs = _server.Pipe()
        given = (theirs, dict(os.environ), location, ranks, world_size, state, cache, loader)
        self._process = _server.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def go(self) -> None:
        """Lets each rank take a step."""
        self._connection.send(None)

    def told(self) -> dict[str, Any]:
        """Of the next step: `samples`, the addresses that the ranks' batches carry; `state`, the loader's after it; and
        `fetched`, how many files were brought from a store so far."""
        return self._connection.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(
    connection: Connection,
    environment: dict[str, str],
    location: str,
    ranks: list[int],
    world_size: int,
    state: State | None,
    cache: ShardCache | None,
    arguments: dict[str, Any],
) -> None:
    os.environ.update(environment)  # the fork server's is of another time
    fetched: list[str] = []
    download = RemoteFolder._download

    def counted(self: RemoteFolder, name: str, xxh3: str, num_bytes: int, target: BinaryIO) -> None:
        fetched.append(name)
        download(self, name, xxh3, num_bytes, target)

    RemoteFolder._download = counted
    loaders = [Loader(Stream(TokenDataset(location, cache=cache), **arguments)) for _ in ranks]
    if state is not None:
        for loader in loaders:
            loader.stream.restore(state)
    while True:
        connection.recv()
        batches = [b for rank, loader in zip(ranks, loaders, strict=True) for b in loader.step(rank, world_size, 1)]
        samples = [tuple(sample) for b in batches for sample in b.samples_B3.tolist() if sample[0] >= 0]
        connection.send({"samples": samples, "state": loaders[0].stream.state(), "fetched": len(fetched)})
