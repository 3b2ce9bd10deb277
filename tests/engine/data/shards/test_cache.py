"""The cache never holds more than its limit, whoever uses it and however a process dies."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from engine.data.shards.cache import PARTIAL, ShardCache
from engine.errors import DataError

FILE_BYTES = 1000
LIMIT = 4 * FILE_BYTES + 500
FORK: Any = multiprocessing.get_context("fork")


def content(name: str) -> bytes:
    return np.random.default_rng(int(name)).bytes(FILE_BYTES)


def writes(name: str) -> Callable[[BinaryIO], None]:
    def fetch(file: BinaryIO) -> None:
        for first in range(0, FILE_BYTES, 100):
            file.write(content(name)[first : first + 100])

    return fetch


def get(cache: ShardCache, name: str) -> BinaryIO:
    return cache.open(name, FILE_BYTES, writes(name))


def never(file: BinaryIO) -> None:
    raise AssertionError("fetched again")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_file_is_fetched_once_and_what_was_used_last_stays(tmp_path):
    cache = ShardCache(tmp_path, LIMIT)
    for name in ("1", "2", "3", "4"):
        get(cache, name).close()
    with cache.open("1", FILE_BYTES, never) as file:
        assert file.read() == content("1")
    get(cache, "5").close()
    assert names(tmp_path) == {"1", "3", "4", "5"}
    assert cache.used_bytes() == 4 * FILE_BYTES


def test_what_is_held_is_not_evicted_and_a_full_cache_is_waited_for(tmp_path):
    pauses: list[float] = []
    held: list[BinaryIO] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            held.pop(0).close()  # another rank ends its step

    cache = ShardCache(tmp_path, LIMIT, sleep)
    held += [get(cache, name) for name in ("1", "2", "3", "4")]
    assert cache.open_now("5", FILE_BYTES, never) is None
    get(cache, "5").close()
    assert pauses == [0.05, 0.1, 0.2]
    assert names(tmp_path) == {"2", "3", "4", "5"}
    held += [get(cache, "5")]
    with pytest.raises(DataError, match=r"no room for 1,000 bytes .* all that it holds is in use") as caught:
        get(cache, "6")
    assert f"above {LIMIT:,}" in str(caught.value)
    with pytest.raises(DataError, match="holds 4,500 bytes, a shard has 9,000"):
        cache.open("7", 9000, never)


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, LIMIT)

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        assert cache.used_bytes() == FILE_BYTES  # the whole place is taken from the start
        raise DataError("no answer")

    with pytest.raises(DataError, match="no answer"):
        cache.open("1", FILE_BYTES, fails)
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be made: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", LIMIT)


def reader(folder: Path, seed: int, connection: Any) -> None:
    """A rank: many files in random order, up to two of them held at a time."""
    cache, generator, fetched = ShardCache(folder, LIMIT), np.random.default_rng(seed), []
    for _ in range(60):
        first = str(generator.integers(12))

        def fetch(file: BinaryIO, name: str = first) -> None:
            fetched.append(name)
            writes(name)(file)

        with cache.open(first, FILE_BYTES, fetch) as file:
            assert file.read() == content(first), first
    connection.send(len(fetched))


def test_ranks_share_it_and_its_size_never_passes_the_limit(tmp_path):
    """Four processes at once; a thread looks at the folder all the time."""
    ShardCache(tmp_path, LIMIT)
    over, done = [], threading.Event()

    def watch() -> None:
        cache = ShardCache(tmp_path, LIMIT)
        while not done.is_set():
            if (used := cache.used_bytes()) > LIMIT:
                over.append(used)

    pipes = [FORK.Pipe() for _ in range(4)]
    ranks = [FORK.Process(target=reader, args=(tmp_path, n, theirs)) for n, (_, theirs) in enumerate(pipes)]
    for rank in ranks:
        rank.start()
    watcher = threading.Thread(target=watch)
    watcher.start()
    fetched = [ours.recv() for ours, _ in pipes if ours.poll(100)]
    for rank in ranks:
        rank.join()
    done.set()
    watcher.join()
    assert len(fetched) == 4
    assert sum(fetched) < 4 * 60  # they found each other's
    assert not over
    assert not [name for name in names(tmp_path) if name.endswith(PARTIAL)]


def dies(folder: Path, connection: Any) -> None:
    """A rank that is killed while it holds a file and fetches another."""
    cache = ShardCache(folder, LIMIT)
    held = get(cache, "1")

    def hangs(file: BinaryIO) -> None:
        file.write(b"half")
        connection.send("fetching")
        signal.pause()

    cache.open("2", FILE_BYTES, hangs)
    held.close()


def test_what_a_killed_rank_held_or_fetched_is_free_again(tmp_path):
    ours, theirs = FORK.Pipe()
    rank = FORK.Process(target=dies, args=(tmp_path, theirs))
    rank.start()
    assert ours.recv() == "fetching"
    cache = ShardCache(tmp_path, LIMIT)
    assert cache.open_now("2", FILE_BYTES, never) is None  # another is at it
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(get(cache, "2").read()))
    waiting.start()  # waits for the other's fetch, and does it itself when that one is gone
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    waiting.join(60)
    for name in ("3", "4", "5", "6"):
        get(cache, name).close()
    assert "1" not in names(tmp_path)
    assert cache.used_bytes() <= LIMIT
    assert found == [content("2")]
    with cache.open("2", FILE_BYTES, writes("2")) as file:
        assert file.read() == content("2")
