"""No token of a damaged shard is ever handed out, and each kind of damage has its own message."""

import errno
import json
import mmap
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

import engine.data.shards.arrays
import engine.data.shards.dataset
from engine.data.shards.damage import DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE, Index, read_index, write_index
from engine.data.shards.open_shards import OpenShards
from engine.data.shards.writer import ShardWriter
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, made_up_documents(60), shard_tokens=300)
    return tmp_path


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["tokens", "documents"])
@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_bit_is_found_and_both_hashes_are_named(folder, suffix, position):
    path = folder / f"shard-000001.{suffix}"
    expected = xxhash.xxh3_128_hexdigest(path.read_bytes())
    flip_bit(path, position)
    dataset = TokenDataset(folder)
    dataset.shard(0)
    with pytest.raises(DataError, match=re.escape(f"{path} is damaged")) as caught:
        dataset.shard(1)
    assert f"allowed: xxh3 {expected}" in str(caught.value)
    assert xxhash.xxh3_128_hexdigest(path.read_bytes()) in str(caught.value)
    assert "palimpsest prepare --overwrite" in str(caught.value)


def test_a_missing_a_short_and_a_long_file_are_told_apart(folder):
    path = folder / "shard-000000.tokens"
    content = path.read_bytes()
    for changed, message in ((content[:-2], "is truncated"), (content + b"\0\0", "is longer than it was written")):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=message) as caught:
            TokenDataset(folder).shard(0)
        assert f"{len(content):,} bytes" in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        TokenDataset(folder).shard(0)


def test_a_file_that_cannot_be_read_is_a_data_error(folder):
    size = (folder / "shard-000000.tokens").stat().st_size
    (folder / "shard-000000.tokens").unlink()
    (folder / "shard-000000.tokens").symlink_to("shard-000000.tokens")  # a loop: not even its size can be asked
    assert size
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset(folder).shard(0)


def test_offsets_that_do_not_fit_are_refused_though_their_hash_is_right(folder):
    index = read_index(folder)
    offsets = np.fromfile(folder / "shard-000000.documents", "<u8")
    offsets[1], offsets[2] = offsets[2], offsets[1]
    offsets.tofile(folder / "shard-000000.documents")
    tree = json.loads((folder / FILE).read_text())
    array = index.shards[0].documents
    fixed = type(array)(**{**tree["shards"][0]["documents"], "xxh3": xxhash.xxh3_128_hexdigest(offsets.tobytes())})
    shard = type(index.shards[0])(index.shards[0].tokens, fixed)
    write_index(folder, Index(index.vocab_size, index.eos_id, index.tokenizer_hash, (shard, *index.shards[1:])))
    with pytest.raises(DataError, match="do not fit their shard"):
        TokenDataset(folder).shard(0)


def test_another_tokenizer_is_refused_and_both_are_named(folder):
    TokenDataset(folder, "tokenizer-hash")
    with pytest.raises(DataError, match="written with tokenizer tokenizer-hash, but this run's tokenizer is other"):
        TokenDataset(folder, "other")


def test_each_shard_is_hashed_once_per_process_also_when_maps_are_dropped(folder, monkeypatch):
    hashed = []
    real = engine.data.shards.arrays.hash_file
    monkeypatch.setattr(
        engine.data.shards.arrays, "hash_file", lambda path, *rest: hashed.append(path.name) or real(path, *rest)
    )
    monkeypatch.setattr(engine.data.shards.dataset, "OPEN_SHARDS", 2)
    dataset = TokenDataset(folder)
    assert dataset.num_shards > 3
    for _ in range(3):
        for number in range(dataset.num_shards):
            assert dataset.shard(number).tokens.size == dataset.index.shards[number].num_tokens
    assert len(hashed) == len(set(hashed)) == 2 * dataset.num_shards


def test_verify_reads_everything_and_tells_how_far_it_is(folder):
    told = []
    dataset = TokenDataset(folder)
    dataset.verify(told.append)
    assert sum(told) == dataset.index.num_bytes == sum(path.stat().st_size for path in folder.glob("shard-*"))
    flip_bit(folder / f"shard-{dataset.num_shards - 1:06d}.tokens", 3)
    with pytest.raises(DataError, match="is damaged"):
        TokenDataset(folder).verify()


def test_sentence_offsets_without_a_documents_are_refused_though_their_hash_is_right(tmp_path):
    with ShardWriter(tmp_path, 1000, 0, "hash") as writer:
        for _ in range(2):
            writer.add(np.arange(8), np.array([0, 3]))
    offsets = np.fromfile(tmp_path / "shard-000000.sentences", "<u8")
    assert offsets.tolist() == [0, 3, 8, 11, 16]
    offsets[2] = 9
    offsets.tofile(tmp_path / "shard-000000.sentences")
    index = read_index(tmp_path)
    bad = xxhash.xxh3_128_hexdigest(offsets.tobytes())
    shard = index.shards[0]
    assert shard.sentences is not None
    write_index(tmp_path, replace(index, shards=(replace(shard, sentences=replace(shard.sentences, xxh3=bad)),)))
    with pytest.raises(DataError, match=r"sentences do not fit their shard") as caught:
        TokenDataset(tmp_path).shard(0)
    assert "each document's among them" in str(caught.value)


def test_a_local_shard_that_changes_after_it_was_verified_is_compared_again(folder, monkeypatch):
    monkeypatch.setattr(engine.data.shards.dataset, "OPEN_SHARDS", 1)
    dataset = TokenDataset(folder)
    dataset.shard(0)
    dataset.shard(1)
    path = folder / "shard-000000.tokens"
    flip_bit(path, 4)
    os.utime(path, ns=(0, 0))  # a clock is coarse: not before its next tick
    with pytest.raises(DamagedShard, match="is damaged"):
        dataset.shard(0)


def test_a_folder_that_is_gone_is_no_damage_of_its_shards(folder):
    dataset = TokenDataset(folder)
    folder.rename(folder.with_name("away"))
    with pytest.raises(DataError, match=r"shard-000000.* is missing, and so is .*index.json") as caught:
        dataset.shard(0)
    assert not isinstance(caught.value, DamagedShard)
    assert "mounted" in caught.value.remedy


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_bound_of_open_shards_is_one_over_all_data_sets_of_the_process(folder, monkeypatch):
    monkeypatch.setattr(engine.data.shards.dataset, "OPEN_SHARDS", 5)
    before, datasets = open_files(), [TokenDataset(folder) for _ in range(4)]
    for number in range(datasets[0].num_shards):
        for dataset in datasets:
            assert dataset.shard(number).tokens.size
            assert open_files() <= before + 5
    assert sum(len(dataset._open) for dataset in datasets) == 5


def test_as_many_shards_are_kept_open_as_the_limit_of_open_files_has_room_for(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {"now": (1024, 1024)}
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.update(now=limit))
    assert OpenShards().most_by_files() == 256
    limits["now"] = (256, 4096)
    assert OpenShards().most_by_files() == (4096 - 512) // 2
    assert limits["now"] == (4096, 4096)
    limits["now"] = (256, resource.RLIM_INFINITY)
    assert OpenShards().most_by_files() > 512
    assert limits["now"] == (65536, resource.RLIM_INFINITY)
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_too_many_open_files_are_told_with_the_limit_and_not_as_rights(folder, monkeypatch):
    dataset, real, left = TokenDataset(folder), mmap.mmap, [0]
    dataset.shard(0)

    def refuses(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", refuses)
    left[0] = 1
    assert dataset.shard(1).tokens.size, "what was open is given up, and it is tried again"
    assert dataset._open == [1]
    left[0] = 99
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with pytest.raises(DataError, match=rf"too many open files: {soft:,} are allowed \(ulimit -n\)") as caught:
        dataset.shard(2)
    assert "ulimit -n 65536" in caught.value.remedy
    assert "rights" not in str(caught.value)


MIXTURE = """
import resource, sys
from pathlib import Path
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
from engine.data.loader import Loader
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
folder = Path(sys.argv[1])
cache = ShardCache(folder / "cache", 10**8)
sets = [TokenDataset(f"file://{folder}/{k}" if k % 2 else folder / str(k), cache=cache) for k in range(16)]
stream = Stream([WeightedDataset(data, f"s{k}") for k, data in enumerate(sets)], 8, 64, 1, 48, "document")
loader, most = Loader(stream), 0
for _ in range(60):
    batches = loader.step(0, 1, 64)
    most = max(most, len(list(Path("/proc/self/fd").iterdir())))
print(most, stream.sample_hash(50))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files of a process in /proc")
def test_a_mixture_of_16_sources_reads_on_under_ulimit_n_1024(tmp_path):
    """768 shards in windows of 48, half of them through a cache: hard limit 1024, or raised as far as it goes."""
    for number in range(16):
        documents = made_up_documents(48, longest=12, seed=number)
        write_shards(tmp_path / str(number), documents, shard_tokens=1)
    ends = set()
    for hard in (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        done = subprocess.run(
            [sys.executable, "-c", MIXTURE, str(tmp_path), str(hard)], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-2000:]
        most, end = done.stdout.split()
        assert int(most) < 1024 or hard > 1024
        ends.add(end)
    assert len(ends) == 1
