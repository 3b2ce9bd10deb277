"""Pinned rows: the view over them is the one over the shards that are gone, as far as the bound reaches."""

from dataclasses import replace

import numpy as np
import pytest

from engine.data.replay.generation import Generation
from engine.data.replay.pinned import PinnedRows, chosen, write_pinned
from engine.data.replay.view import ReplayDataset
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.errors import CheckpointError, DataError
from tests.engine.data.corpus import made_up_documents, write_sentences, write_shards
from tests.engine.data.replay.generations import generation_of


@pytest.fixture
def sets(tmp_path):
    """Two data sets of plain shards."""
    return [write_shards(tmp_path / str(seed), made_up_documents(90, seed=seed)) for seed in (1, 2)]


def pin(folder, view: ReplayDataset, file_bytes: int = 400) -> list:
    rows = (row for number in range(view.num_shards) for row in view.rows(number))
    return list(write_pinned(folder, rows, view.index, file_bytes))


def with_pins(folder, generation: Generation, files) -> Generation:
    return replace(generation, pinned=PinnedRows(folder, files))


def check_same(one: ReplayDataset, other: ReplayDataset) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.index == other.index
    for number in range(one.num_shards):
        ours, theirs = one.shard(number), other.shard(number)
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.documents, theirs.documents)
        assert np.array_equal(ours.forgotten, theirs.forgotten)
        pairs = zip(one.offsets(number), other.offsets(number), strict=True)
        for mine, its in pairs:
            assert (mine is None) == (its is None)
            assert mine is None or its is None or np.array_equal(mine, its)


@pytest.mark.parametrize("left", [(), (0,), (1,), (0, 1)])
def test_the_view_is_the_same_whatever_shards_are_left(sets, tmp_path, left):
    generation = generation_of(*sets)
    whole = ReplayDataset(generation, sets, block_rows=16)
    files = pin(tmp_path / "files", whole)
    assert len(files) > 5
    pinned = with_pins(tmp_path / "files", generation, files)
    assert pinned.pinned is not None
    assert pinned.pinned.num_rows == generation.num_rows
    check_same(ReplayDataset(pinned, [sets[number] for number in left], block_rows=16), whole)


def test_sentences_are_pinned_with_their_rows(tmp_path):
    dataset = write_sentences(tmp_path / "data", 80)
    generation = generation_of(dataset)
    whole = ReplayDataset(generation, [dataset], block_rows=16)
    pinned = with_pins(tmp_path / "files", generation, pin(tmp_path / "files", whole))
    view = ReplayDataset(pinned, [], block_rows=16)
    assert view.index.has_sentences
    assert view.index.splits_sentences
    check_same(view, whole)


def test_what_is_pinned_is_pinned_again_from_its_copies(sets, tmp_path):
    """At the end of the next run stage the source may be gone: the files are byte for byte those of before."""
    generation = generation_of(*sets)
    files = pin(tmp_path / "files", ReplayDataset(generation, sets))
    again = ReplayDataset(with_pins(tmp_path / "files", generation, files), sets[:1])
    assert pin(tmp_path / "again", again) == files
    assert pin(tmp_path / "turned", ReplayDataset(generation, sets[::-1])) == files


@pytest.mark.parametrize("max_bytes", [1, 300, 2000, 10**9])
def test_the_bound_holds_and_takes_the_first_rows_of_each_domain(sets, tmp_path, max_bytes):
    generation = generation_of(*sets)
    found = chosen(generation, (), max_bytes, 2)
    assert 2 * found.num_tokens <= max_bytes
    for name, domain in found.domains.items():
        whole = generation.domains[name]
        rows = [(found.shards[row_id >> 44], row_id % 2**44) for row_id in domain.row_ids.tolist()]
        expected = [(generation.shards[row_id >> 44], row_id % 2**44) for row_id in whole.row_ids.tolist()]
        assert rows == expected[: len(rows)]
        if max_bytes >= 2000:
            share = min(1.0, max_bytes / (2 * generation.num_tokens))
            # a row is 20 tokens at most
            assert abs(2 * domain.num_tokens - share * 2 * whole.num_tokens) <= 2 * 20
    assert chosen(generation, ("domain 1",), 10**9, 2).domains.keys() == {"domain 1"}
    if max_bytes == 10**9:
        assert found.hash == generation.hash


def test_rows_that_are_not_pinned_are_lost_with_their_shard(sets, tmp_path):
    generation = generation_of(*sets)
    few = ReplayDataset(chosen(generation, (), generation.num_tokens, 2), sets)
    pinned = with_pins(tmp_path / "files", generation, pin(tmp_path / "files", few))
    with pytest.raises(DataError, match=r"rows to replay are in .* shards that are missing"):
        ReplayDataset(pinned, [])
    view = ReplayDataset(pinned, [], most_stale=1.0)
    assert view.generation.num_rows == few.generation.num_rows
    assert ReplayDataset(pinned, sets).generation.hash == generation.hash


def test_a_forgotten_document_is_not_emitted_from_a_copy(sets, tmp_path):
    generation = generation_of(*sets)
    gone = Tombstones({entry.content_hash: range(0, entry.num_documents, 2) for entry in sets[0].index.shards})
    pinned = with_pins(tmp_path / "files", generation, pin(tmp_path / "files", ReplayDataset(generation, sets)))
    check_same(ReplayDataset(pinned, [], gone, block_rows=16), ReplayDataset(generation, sets, gone, block_rows=16))
    assert len(ReplayDataset(pinned, [], gone).tombstones) > len(NO_TOMBSTONES)
    assert pinned.pinned is not None
    held = pinned.pinned.documents
    assert {name: numbers.tolist() for name, numbers in held.items()} == {
        entry.content_hash: list(range(entry.num_documents)) for dataset in sets for entry in dataset.index.shards
    }


def test_a_damaged_file_is_named(sets, tmp_path):
    generation, folder = generation_of(*sets), tmp_path / "files"
    files = pin(folder, ReplayDataset(generation, sets), file_bytes=10**9)
    (named,) = files
    path = folder / named.name
    whole = path.read_bytes()
    for content, said in (
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "xxh3 differs"),
        (whole[:-1], "bytes, .* were written"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{named.name}: .*{said}"):
            PinnedRows(folder, files)
    path.unlink()
    with pytest.raises(CheckpointError, match="it cannot be read"):
        PinnedRows(folder, files)


def test_no_file_is_longer_than_asked_for_by_more_than_a_row(sets, tmp_path):
    generation = generation_of(*sets)
    files = pin(tmp_path / "files", ReplayDataset(generation, sets), file_bytes=1000)
    rows = [PinnedRows(tmp_path / "files", [named]) for named in files]
    assert sum(part.num_rows for part in rows) == generation.num_rows
    tokens = [sum(row.tokens.size for row in _all_rows(part)) for part in rows]
    assert all(2 * count <= 1000 + 2 * 20 for count in tokens)
    assert all(2 * count >= 1000 for count in tokens[:-1])


def _all_rows(part: PinnedRows):
    for name, documents in part.documents.items():
        inside = (documents[:, None].astype(np.uint64) << np.uint64(16) | np.arange(8, dtype=np.uint64)).ravel()
        yield from part.read(name, inside[part.has(name, inside)])
