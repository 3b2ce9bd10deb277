"""Documents come back as they were written, and a folder counts as written only once all of it is."""

import os
from dataclasses import replace

import numpy as np
import pytest
import xxhash
import zstandard

import engine.data.shards.dataset
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE, Compressed, read_index, write_index
from engine.data.shards.writer import ShardWriter, cut_into_shards
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


def documents_of(dataset):
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for start, end in zip(shard.documents[:-1], shard.documents[1:], strict=True):
            yield shard.tokens[start:end]


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_documents_come_back_whole_and_in_order(tmp_path, vocab_size):
    documents = made_up_documents(100)
    documents[3][0] = vocab_size - 1
    dataset = write_shards(tmp_path, documents, shard_tokens=300, vocab_size=vocab_size)
    back = list(documents_of(dataset))
    assert len(back) == len(documents)
    assert all(np.array_equal(before, after) for before, after in zip(documents, back, strict=True))
    assert back[0].dtype.itemsize == (2 if vocab_size == 1000 else 4)


def test_shards_are_as_long_as_asked_and_cut_no_document(tmp_path):
    dataset = write_shards(tmp_path, [np.arange(1, length + 1) for length in (6, 4, 1, 30, 2, 9)], shard_tokens=10)
    assert [shard.num_tokens for shard in dataset.index.shards] == [10, 1, 30, 2, 9]
    assert [shard.num_documents for shard in dataset.index.shards] == [2, 1, 1, 1, 1]


def test_the_same_documents_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, made_up_documents(50))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def write_and_fail(folder, fail):
    with ShardWriter(folder, 1000, 0, "hash", 20) as writer:
        for _ in range(4):
            writer.add(np.arange(8))
        fail()


def test_a_writer_that_fails_leaves_no_index(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path, interrupt)
    assert list(tmp_path.glob("*.tokens"))
    with pytest.raises(DataError, match=r"holds no index\.json"):
        TokenDataset(tmp_path)


def test_writing_again_sweeps_what_was_there_and_nothing_else(tmp_path):
    write_shards(tmp_path, made_up_documents(100), shard_tokens=100)
    (tmp_path / "notes.txt").write_text("mine")
    dataset = write_shards(tmp_path, made_up_documents(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        FILE,
        "notes.txt",
        "shard-000000.documents",
        "shard-000000.tokens",
    ]
    dataset.verify()


def test_no_documents_make_an_empty_data_set(tmp_path):
    dataset = write_shards(tmp_path, [])
    assert (dataset.num_shards, dataset.index.num_tokens) == (0, 0)


def test_an_output_that_is_no_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write token shards to .*file") as caught:
        write_shards(tmp_path / "file", made_up_documents(1))
    assert "to do: make room, or choose another folder" in str(caught.value)


def test_a_full_disk_is_one_clear_error_and_leaves_no_index(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device"):
        write_and_fail(tmp_path, lambda: monkeypatch.setattr(os, "fsync", full))
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("longest", [0, 5, 1000])
def test_cutting_lengths_is_what_the_writer_does(tmp_path, longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 2, 50)
    dataset = write_shards(tmp_path, [np.ones(length, np.int64) for length in lengths], shard_tokens=40)
    bounds = cut_into_shards(lengths, 40)
    assert np.diff(bounds).tolist() == [shard.num_documents for shard in dataset.index.shards]
    assert cut_into_shards(lengths[:0], 40).tolist() == [0]


def write_compressed(folder, documents, **options):
    with ShardWriter(folder, 1000, 0, "tokenizer-hash", 800, compression="zstd", **options) as writer:
        for document in documents:
            writer.add(document, np.array([0, 1]))


def test_compressed_shards_are_smaller_and_the_same_data(tmp_path):
    documents = [np.resize(document, 50) for document in made_up_documents(40)]
    write_compressed(tmp_path / "a", documents)
    write_compressed(tmp_path / "b", documents)
    with ShardWriter(tmp_path / "plain", 1000, 0, "tokenizer-hash", 800) as writer:
        for document in documents:
            writer.add(document, np.array([0, 1]))
    dataset, plain = TokenDataset(tmp_path / "a"), TokenDataset(tmp_path / "plain")
    assert dataset.num_shards > 3
    assert dataset.fingerprint == plain.fingerprint
    assert all(np.array_equal(*pair) for pair in zip(documents_of(dataset), documents_of(plain), strict=True))
    one, other = dataset.shard(1).sentences, plain.shard(1).sentences
    assert one is not None
    assert other is not None
    assert np.array_equal(one, other)
    assert (dataset.index.version, plain.index.version) == (2, 1)
    assert dataset.index.num_bytes == plain.index.num_bytes > dataset.index.stored_bytes
    files = sorted((tmp_path / "a").iterdir())
    assert sum(path.stat().st_size for path in files if path.name != FILE) == dataset.index.stored_bytes
    assert all(path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() for path in files)
    write_shards(tmp_path / "a", documents)
    assert not list((tmp_path / "a").glob("*.zst"))


def test_every_damage_of_a_compressed_file_is_found(tmp_path):
    write_compressed(tmp_path, made_up_documents(10))
    for name in ("shard-000000.tokens.zst", "shard-000000.documents.zst", "shard-000000.sentences.zst"):
        path = tmp_path / name
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(DataError, match="is damaged: its bytes have xxh3"):
                TokenDataset(tmp_path).shard(0)
        path.write_bytes(content[:-1])
        with pytest.raises(DataError, match="is truncated"):
            TokenDataset(tmp_path).shard(0)
        path.write_bytes(content)
    TokenDataset(tmp_path).shard(0)


def test_what_unpacks_to_something_else_is_found_though_its_hash_is_right(tmp_path):
    """As if the compressor had failed, or memory while it ran."""
    write_compressed(tmp_path, made_up_documents(10))
    path = tmp_path / "shard-000000.tokens.zst"
    index = read_index(tmp_path)
    tokens = index.shards[0].tokens
    plain = bytearray(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
    plain[5] ^= 1
    packed = zstandard.ZstdCompressor().compress(plain)
    for content, message in ((packed, "is damaged: its bytes have xxh3 .* unpacked"), (b"text", "does not unpack")):
        path.write_bytes(content)
        compressed = Compressed("zstd", len(content), xxhash.xxh3_128_hexdigest(content))
        shard = replace(index.shards[0], tokens=replace(tokens, compressed=compressed))
        write_index(tmp_path, replace(index, shards=(shard, *index.shards[1:])))
        with pytest.raises(DataError, match=message):
            TokenDataset(tmp_path).shard(0)


def test_unpacked_shards_are_dropped_when_they_fill_their_room(tmp_path, monkeypatch):
    write_compressed(tmp_path, made_up_documents(100))
    dataset = TokenDataset(tmp_path)
    monkeypatch.setattr(engine.data.shards.dataset, "UNPACKED_BYTES", 2000)
    for number in [*range(dataset.num_shards)] * 2:
        dataset.shard(number)
        assert sum(dataset.index.shards[n].tokens.bytes for n in dataset._open) <= 2000
    monkeypatch.setattr(engine.data.shards.dataset, "UNPACKED_BYTES", 10)
    assert dataset.shard(0) is dataset.shard(0)
