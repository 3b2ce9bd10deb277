"""No token of a damaged shard is ever handed out, and each kind of damage has its own message."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import xxhash

import engine.data.shards.arrays
import engine.data.shards.dataset
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE, Index, read_index, write_index
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
