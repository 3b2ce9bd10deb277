"""Rows cover a shard exactly, and documents are where they were."""

import numpy as np
import pytest

from engine.data.objectives.packing import Concatenation, num_rows
from tests.engine.data.corpus import EOS, made_up_documents, write_shards


def rows_of(dataset, capacity, reads):
    """(shard, its rows) of each shard."""
    packing = Concatenation(dataset, capacity, reads)
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        count = int(packing.count(np.array([number]))[0])
        yield shard, [packing.row(shard, number, row) for row in range(count)]


@pytest.mark.parametrize("capacity", [1, 2, 7, 16, 100, 5000])
def test_every_token_but_the_first_follows_another_exactly_once(tmp_path, capacity):
    dataset = write_shards(tmp_path, made_up_documents(40), shard_tokens=250)
    for shard, rows in rows_of(dataset, capacity, "successors"):
        assert len(rows) == -(-(shard.tokens.size - 1) // capacity)
        assert np.array_equal(
            np.concatenate([row.successors for row in rows if row.successors is not None]), shard.tokens[1:]
        )
        assert np.array_equal(np.concatenate([row.tokens for row in rows]), shard.tokens[:-1])
        assert {row.tokens.size for row in rows[:-1]} <= {capacity}


@pytest.mark.parametrize("capacity", [1, 2, 7, 16, 100, 5000])
@pytest.mark.parametrize("reads", ["all", "text"])
def test_every_token_is_read_exactly_once(tmp_path, capacity, reads):
    dataset = write_shards(tmp_path, made_up_documents(40), shard_tokens=250)
    for shard, rows in rows_of(dataset, capacity, reads):
        expected = shard.tokens if reads == "all" else shard.tokens[shard.tokens != EOS]
        found = np.concatenate([row.tokens for row in rows])
        assert np.array_equal(found, expected[: found.size])
        assert expected.size - found.size <= (reads == "text")  # a row of one token could not be corrupted
        assert {row.tokens.size for row in rows[:-1]} <= {capacity}


@pytest.mark.parametrize("capacity", [3, 8, 64])
@pytest.mark.parametrize("reads", ["successors", "all", "text"])
def test_documents_begin_where_ends_of_text_say(tmp_path, capacity, reads):
    dataset = write_shards(tmp_path, made_up_documents(40, longest=20), shard_tokens=150)
    for shard, rows in rows_of(dataset, capacity, reads):
        # independent of the offsets: a document begins after each end of text
        documents = np.concatenate([[0], np.cumsum(shard.tokens == EOS)[:-1]])
        documents = documents[shard.tokens != EOS] if reads == "text" else documents
        for number, row in enumerate(rows):
            mine = documents[number * capacity :][: row.tokens.size]
            assert row.starts.tolist() == (np.flatnonzero(np.diff(mine)) + 1).tolist()
            assert row.document_lengths(capacity).sum() == capacity
            inside = row.document_lengths(capacity)[: row.starts.size + 1]
            assert inside.tolist() == np.unique(mine, return_counts=True)[1].tolist()
            assert np.array_equal(np.concatenate(row.documents()), row.tokens)
            if reads == "successors":
                assert row.ends.tolist() == np.flatnonzero(row.tokens == EOS).tolist()


@pytest.mark.parametrize("capacity", [3, 16, 500])
@pytest.mark.parametrize("reads", ["successors", "all"])
def test_rows_read_together_are_the_rows_read_alone(tmp_path, capacity, reads):
    """Of few and of many shards in turn, so that shards are forgotten and come back."""
    dataset = write_shards(tmp_path, made_up_documents(120), shard_tokens=200)
    packing, width = Concatenation(dataset, capacity, reads), capacity + (reads == "successors")
    counts = packing.count(np.arange(dataset.num_shards))
    places = np.stack([np.repeat(np.arange(counts.size), counts), np.concatenate(list(map(np.arange, counts)))], axis=1)
    generator = np.random.default_rng(0)
    for count in [1, 40, 2, 2, 0, 40, 1, 7]:
        chosen = generator.choice(places, count)
        into = np.full((count, width), -1, np.int64)
        read = packing.stretches(dataset.shard, chosen, into)
        for place, tokens, size, row in zip(chosen, into, read.sizes_N, range(count), strict=True):
            alone = packing.row(dataset.shard(place[0]), *place)
            begins = alone.starts if alone.successors is None else alone.ends + 1
            expected = alone.tokens if alone.successors is None else np.append(alone.tokens, alone.successors[-1])
            assert np.array_equal(tokens[:size], expected)
            assert (tokens[size:] == -1).all()
            assert read.positions[read.rows == row].tolist() == begins.tolist()


def test_shards_too_short_for_a_target_have_no_row():
    assert num_rows(np.array([0, 1, 2, 5, 6]), 4, "successors").tolist() == [0, 0, 1, 1, 2]
    assert num_rows(np.array([0, 1, 2, 5, 6]), 4, "text").tolist() == [0, 0, 1, 1, 2]
    assert num_rows(np.array([0, 1, 2, 5, 6]), 4, "all").tolist() == [0, 1, 1, 2, 2]
