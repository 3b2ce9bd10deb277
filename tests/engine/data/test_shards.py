"""Documents come back as they were written, and a folder counts as written only once all of it is."""

import os

import numpy as np
import pytest

from engine.data.dataset import TokenDataset
from engine.data.index import FILE
from engine.data.shards import ShardWriter
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
    assert "to do: make room or name another --output" in str(caught.value)


def test_a_full_disk_is_one_clear_error_and_leaves_no_index(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device"):
        write_and_fail(tmp_path, lambda: monkeypatch.setattr(os, "fsync", full))
    assert not (tmp_path / FILE).exists()
