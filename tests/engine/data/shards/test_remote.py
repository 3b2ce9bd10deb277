"""Data sets at URLs: the same batches as from disk, whatever the store, and errors that name shard and reason."""

import errno
import io
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

import engine.data.shards.arrays
from engine.data.loader import Loader
from engine.data.prefetch import Prefetcher
from engine.data.shard_fetcher import ShardFetcher
from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Stream
from engine.data.validation import ValidationSamples
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards
from tests.engine.data.rank import Ranks
from tests.engine.data.shards.stores import (
    SHARD_TOKENS,
    in_memory,
    in_s3,
    on_disk,
    over_http,
    remote,
    small_cache,
)


def loader(dataset: TokenDataset) -> Loader:
    return Loader(Stream(dataset, 16, 12, 3, 4, "document", "best_fit"))


@pytest.mark.parametrize("store", [on_disk, in_memory, over_http, in_s3])
def test_batches_from_a_store_are_those_from_disk_and_the_cache_keeps_its_limit(store, local, tmp_path):
    plain = loader(TokenDataset(local))
    with store(local) as url:
        cache = small_cache(tmp_path / "cache", local)
        dataset = TokenDataset(url, "tokenizer-hash", cache)
        assert dataset.num_shards > 14
        assert dataset.fingerprint == plain.stream.fingerprint
        reader = loader(dataset)
        assert reader.stream.state() == plain.stream.state()
        with Prefetcher(reader.stream, 0, 1, 12) as ahead:
            for _ in range(2 * plain.stream.samples_per_epoch() // 12):
                [[mine], [expected]] = ahead.step(), plain.step(0, 1, 12)
                assert mine.sources == expected.sources
                assert all(mine.inputs[name].equal(expected.inputs[name]) for name in mine.inputs)
                assert cache.used_bytes() <= cache.limit_bytes
        held_out = ValidationSamples(dataset, 16, "document")
        expected = ValidationSamples(TokenDataset(local), 16, "document")
        sums = [sum(b.weights["causal"] for b in item.batches(0, 1, 8)) for item in (held_out, expected)]
        assert sums[0] == sums[1]


def test_ranks_of_a_node_share_what_one_fetched_from_s3_and_the_limit_holds(local, tmp_path):
    """Three processes step by step, as collectives hold them; a thread looks at the folder all the time.

    Of an epoch every file is fetched once: the cache has room for two windows.
    """
    how: dict[str, Any] = {"sequence_length": 16, "global_batch_size": 12, "seed": 3, "window_shards": 4}
    alone = Loader(Stream(TokenDataset(local), **how, attention="document"))
    cache, over, done = small_cache(tmp_path / "cache", local), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if (used := cache.used_bytes()) > cache.limit_bytes:
                over.append(used)

    with in_s3(local) as url:
        ranks = [Ranks(url, [rank], 3, cache=cache, **how, attention="document") for rank in range(3)]
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for _ in range(alone.stream.samples_per_epoch() // 12):
                for rank in ranks:
                    rank.go()
                told = [rank.told() for rank in ranks]
                [expected] = alone.step(0, 1, 12)
                found = [sample for each in told for sample in each["samples"]]
                assert sorted(found) == sorted(map(tuple, expected.samples_B3.tolist()))
        finally:
            done.set()
            watcher.join()
            for rank in ranks:
                rank.kill()
    fetched = [each["fetched"] for each in told]
    files = sum(len(shard.arrays) for shard in TokenDataset(local).index.shards)
    assert sum(fetched) == files, fetched
    assert min(fetched) < files / 2
    assert not over


def test_many_ranks_at_the_least_limit_of_the_cache_all_get_on(local, tmp_path):
    """Room for two windows of two shards, and six processes that move freely, so that they stand in other windows."""
    how: dict[str, Any] = {"sequence_length": 16, "global_batch_size": 12, "seed": 3, "window_shards": 2}
    sizes = sorted(sum(array.stored_bytes for array in shard.arrays) for shard in TokenDataset(local).index.shards)
    cache = ShardCache(tmp_path / "cache", sum(sizes[-4:]))
    alone = Loader(Stream(TokenDataset(local), **how, attention="document"))
    steps = alone.stream.samples_per_epoch() // 12
    expected = [sorted(map(tuple, alone.step(0, 1, 12)[0].samples_B3.tolist())) for _ in range(steps)]
    ranks = [Ranks(f"file://{local}", [rank], 6, cache=cache, **how, attention="document") for rank in range(6)]
    try:
        for rank in ranks:
            for _ in range(steps):
                rank.go()
        told = [[rank.told()["samples"] for _ in range(steps)] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for step, samples in enumerate(expected):
        assert sorted(sample for rank in told for sample in rank[step]) == samples
    assert cache.used_bytes() <= cache.limit_bytes


def test_a_fetch_is_tried_again_later_and_later_until_the_bytes_are_right(store, local, tmp_path):
    array = TokenDataset(local).index.shards[0].tokens
    good = (local / array.file).read_bytes()
    store.failures = [OSError("connection reset"), good[:-1], bytes(len(good))]
    pauses: list[float] = []
    name, file = remote(ShardCache(tmp_path, 10**6), pauses).open(array)
    assert (tmp_path / name).read_bytes() == good
    assert pauses == [0.5, 1.0, 2.0]
    file.close()


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (OSError("connection reset"), DataError, "cannot be fetched, 4 attempts: OSError: connection reset"),
        (b"short", DamagedShard, "is truncated"),
        (b"x" * 5000, DamagedShard, "is longer than it was written"),
        (FileNotFoundError(), DamagedShard, "is missing"),
        (b"<!DOCTYPE html><title>Sign in", DataError, "cannot be fetched, 4 attempts: OSError: a web page came"),
    ],
)
def test_a_fetch_that_fails_names_shard_and_reason_and_leaves_nothing(store, local, tmp_path, failure, error, says):
    array = TokenDataset(local).index.shards[0].tokens
    store.failures = [failure] * 4
    with pytest.raises(error, match=f"s3://bucket/{array.file} {says}") as caught:
        remote(ShardCache(tmp_path, 10**6), []).open(array)
    assert isinstance(caught.value, DamagedShard) == (error is DamagedShard)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert store.asked[array.file] == (1 if isinstance(failure, FileNotFoundError) else 4)


@pytest.mark.parametrize("last", [OSError("503"), bytes(2 * SHARD_TOKENS)])
def test_other_bytes_at_each_attempt_or_trouble_at_the_last_are_no_damage(store, local, tmp_path, last):
    array = TokenDataset(local).index.shards[0].tokens
    store.failures = [b"short", b"shorte", b"shorter", last]
    with pytest.raises(DataError, match="cannot be fetched, 4 attempts") as caught:
        remote(ShardCache(tmp_path, 10**6), []).open(array)
    assert not isinstance(caught.value, DamagedShard)


def test_a_full_cache_disk_is_said_before_anything_is_fetched_and_is_not_the_network(
    store, local, tmp_path, monkeypatch
):
    array = TokenDataset(local).index.shards[0].tokens
    cache = ShardCache(tmp_path, 10**6)

    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        pauses: list[float] = []
        with pytest.raises(
            DataError, match=rf"disk of the cache {tmp_path} has no room for a shard of .* are free"
        ) as caught:
            remote(cache, pauses).open(array)
    assert (store.asked, pauses) == ({}, [])
    assert "network" not in str(caught.value)

    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    far = remote(cache, pauses)  # where the file system cannot reserve
    with pytest.raises(DataError, match="has no room for a shard"):
        far._retry.run(lambda: far._download(array.file, array.xxh3, array.bytes, Full()), "url")
    assert pauses == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own of 64 KiB, which needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("this user may mount no tmpfs: the other tests of a full disk play one")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_disk_that_is_really_full_is_said_and_goes_on_once_there_is_room(small_disk, local, store):
    array = TokenDataset(local).index.shards[0].tokens
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
        file.write(bytes(1 << 17))
    pauses: list[float] = []
    cache = small_disk / "cache"
    filler.write_bytes(bytes(filler.stat().st_size - 4096))
    far = remote(ShardCache(cache, 10**6), pauses)
    with filler.open("ab") as file, suppress(OSError):
        file.write(bytes(1 << 17))
    with pytest.raises(DataError, match=r"has no room for a shard of .* bytes: 0 are free"):
        far.open(array)
    assert (pauses, store.asked) == ([], {})
    filler.unlink()
    name, file = remote(ShardCache(cache, 10**6), pauses).open(array)
    assert (cache / name).read_bytes() == (local / array.file).read_bytes()
    file.close()


def test_a_file_that_changes_in_the_cache_after_it_was_verified_is_noticed_and_fetched_again(store, local, tmp_path):
    dataset = TokenDataset("s3://bucket", cache=ShardCache(tmp_path, 10**6))
    right = (local / "shard-000000.tokens").read_bytes()
    for _ in range(3):
        assert dataset.shard(0).tokens.tobytes() == right
        dataset.release()
    assert store.asked["shard-000000.tokens"] == 1
    [path] = tmp_path.glob("*.tokens")
    with path.open("r+b") as file:  # the same file, the same size, at once
        file.write(b"\1\0\1\0")
    assert dataset.shard(0).tokens.tobytes() == right
    assert store.asked["shard-000000.tokens"] == 2


def test_compressed_shards_of_a_store_are_unpacked_once_and_their_files_are_free(local, tmp_path, monkeypatch):
    folder = tmp_path / "zstd"
    documents = made_up_documents(150)
    write_shards(folder, documents, shard_tokens=SHARD_TOKENS, compression="zstd")
    unpacked: list[str] = []
    real = engine.data.shards.arrays._unpacked
    monkeypatch.setattr(
        engine.data.shards.arrays, "_unpacked", lambda path, array: unpacked.append(path.name) or real(path, array)
    )
    cache = small_cache(tmp_path / "cache", folder)
    stream, plain = loader(TokenDataset(f"file://{folder}", cache=cache)), loader(TokenDataset(local))
    for _ in range(plain.stream.samples_per_epoch() // 12):
        [[mine], [expected]] = stream.step(0, 1, 12), plain.step(0, 1, 12)
        assert all(mine.inputs[name].equal(expected.inputs[name]) for name in mine.inputs)
    packed = [shard.tokens.compressed for shard in TokenDataset(folder).index.shards]
    assert sorted(unpacked.count(f"{each.xxh3}.zst") for each in packed if each) == [1] * len(packed)


def test_a_reader_at_the_least_limit_goes_on_and_holds_nothing_while_it_waits(local, tmp_path):
    """One shard has room in the cache; a step reads rows of several."""
    largest = max(max(a.stored_bytes for a in shard.arrays) for shard in TokenDataset(local).index.shards)
    pauses: list[float] = []
    cache = ShardCache(tmp_path, largest, pauses.append)
    stream, plain = loader(TokenDataset(f"file://{local}", cache=cache)), loader(TokenDataset(local))
    for _ in range(3):
        [[mine], [expected]] = stream.step(0, 1, 12), plain.step(0, 1, 12)
        assert all(mine.inputs[name].equal(expected.inputs[name]) for name in mine.inputs)
    assert pauses


def test_two_runs_that_fill_the_cache_do_not_wait_for_each_other(local, tmp_path):
    """The other run is a second cache object: locks are those of open files. It holds a shard and wants another."""
    sizes = [shard.tokens.bytes for shard in TokenDataset(local).index.shards]
    limit = 2 * max(sizes)
    other = ShardCache(tmp_path, limit)
    theirs = [other.open("theirs", max(sizes), lambda file: None)]

    def sleep(seconds: float) -> None:
        assert mine._open == []
        wanted = other.open_now("theirs too", max(sizes), lambda file: None)  # they get on, too
        assert wanted is not None
        for file in (theirs.pop(), wanted):
            file.close()

    mine = TokenDataset(f"file://{local}", cache=ShardCache(tmp_path, limit, sleep))
    assert mine.shard(0).tokens.size
    assert mine.shard(1).tokens.tobytes() == (local / "shard-000001.tokens").read_bytes()
    assert theirs == []


def test_wrong_bytes_of_the_right_length_are_damage(store, local, tmp_path):
    array = TokenDataset(local).index.shards[1].tokens
    store.failures = [bytes(array.bytes)] * 4
    with pytest.raises(DamagedShard, match="is damaged: its bytes have xxh3"):
        remote(ShardCache(tmp_path, 10**6), []).open(array)


def test_a_file_damaged_in_the_cache_is_fetched_once_more(store, local, tmp_path):
    cache = ShardCache(tmp_path, 10**6)
    dataset = TokenDataset("s3://bucket", cache=cache)
    dataset.fetch_ahead(0)
    [path] = tmp_path.glob("*.tokens")
    path.write_bytes(bytes(path.stat().st_size))
    shard = dataset.shard(0)
    assert shard.tokens.tobytes() == (local / "shard-000000.tokens").read_bytes()
    assert store.asked["shard-000000.tokens"] == 2


def test_shards_are_fetched_before_they_are_used_in_the_order_of_use(store, local, tmp_path):
    dataset = TokenDataset("s3://bucket", cache=small_cache(tmp_path, local))
    reader = loader(dataset)
    coming = [number for _, number in reader.stream.coming_shards()]
    order = reader.stream.order.sources[0].order
    assert coming == [*order.shards(0, 0), *order.shards(0, 1)]
    ahead = ShardFetcher()
    ahead.want(reader.stream.coming_shards())
    wanted = {array.file for number in coming for array in dataset.index.shards[number].arrays}
    while not wanted <= set(store.asked):
        threading.Event().wait(0.01)
    ahead.close()
    asked = Counter(store.asked)
    reader.step(0, 1, 12)
    assert {name for name in store.asked if store.asked[name] > asked[name]} <= wanted


def test_an_index_that_is_not_there_or_no_file_system_is_said(tmp_path):
    cache = ShardCache(tmp_path, 10**6)
    with pytest.raises(DataError, match=r"memory://nothing-here/index.json is missing: no token shards") as caught:
        TokenDataset("memory://nothing-here", cache=cache)
    assert "check the URL" in caught.value.remedy
    assert not isinstance(caught.value, DamagedShard)
    with pytest.raises(DataError, match="no file system for nosuch://bucket"):
        TokenDataset("nosuch://bucket", cache=cache)
    system = fsspec.filesystem("memory")
    system.pipe_file("/prepared/train/index.json", b"{}")
    with pytest.raises(DataError, match="no token shards") as caught:
        TokenDataset("memory://prepared", cache=cache)
    assert caught.value.remedy == "name one of its folders: memory://prepared/train"
    system.pipe_file("/broken/index.json", b"{")
    with pytest.raises(DataError, match=r"memory://broken/index.json is damaged: no JSON"):
        TokenDataset("memory://broken", cache=cache)
