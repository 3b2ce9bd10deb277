"""The view: a frozen reservoir as a data set on which samplers, orders and streams work as on any other."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.replay.view import ReplayDataset
from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import FILE
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones, add_tombstones
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from engine.errors import DataError
from tests.engine.data.corpus import EOS, made_up_documents, write_sentences, write_shards
from tests.engine.data.replay.generations import SPAN, generation_of


@pytest.fixture
def sets(tmp_path):
    """Two data sets of plain shards."""
    return [write_shards(tmp_path / str(seed), made_up_documents(90, seed=seed)) for seed in (1, 2)]


def spans(dataset):
    """Every row of a data set as tokens, by (content hash, document, span)."""
    found = {}
    for number, entry in enumerate(dataset.index.shards):
        shard = dataset.shard(number)
        for document, (start, end) in enumerate(zip(shard.documents[:-1], shard.documents[1:], strict=True)):
            for span, first in enumerate(range(start, end, SPAN)):
                found[entry.content_hash, document, span] = shard.tokens[first : min(first + SPAN, end)].tolist()
    return found


def test_its_documents_are_the_rows_of_the_data_sets_each_once(sets):
    view, wanted = ReplayDataset(generation_of(*sets), sets, block_rows=16), spans(sets[0]) | spans(sets[1])
    found = {}
    for number in range(view.num_shards):
        shard = view.shard(number)
        entry = view.index.shards[number]
        assert (shard.tokens.size, shard.documents.size - 1) == (entry.num_tokens, entry.num_documents)
        for document, (start, end) in enumerate(zip(shard.documents[:-1], shard.documents[1:], strict=True)):
            key = view.entry(number, document)[1:4]
            assert key not in found
            found[key] = shard.tokens[start:end].tolist()
    assert found == wanted
    assert view.num_shards == -(-len(wanted) // 16) > 10
    assert view.index.num_tokens == sum(dataset.index.num_tokens for dataset in sets)


def test_a_block_needs_few_source_shards(sets):
    view = ReplayDataset(generation_of(*sets), sets, block_rows=16)
    changes = sum(len(view._by_shard(number)) - 1 for number in range(view.num_shards))
    assert changes < sum(dataset.num_shards for dataset in sets)


def test_it_is_named_by_its_generation_and_follows_it_alone(sets):
    generation = generation_of(*sets, capacity=50)
    view = ReplayDataset(generation, sets)
    again = ReplayDataset(generation_of(*reversed(sets), capacity=50), list(reversed(sets)))
    assert view.index.num_documents == 50
    assert view.fingerprint == ReplayDataset(generation, sets[::-1]).fingerprint
    # the names of domains are part of a generation
    assert view.fingerprint != again.fingerprint
    assert len({view.fingerprint, *(dataset.fingerprint for dataset in sets)}) == 3


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_stream_over_it_trains_on_every_token_once_an_epoch(sets, packing):
    view = ReplayDataset(generation_of(*sets), sets, block_rows=16)
    length = 16
    stream = Stream(view, length, 1, 0, 4, "document", packing)
    loader, found = Loader(stream), Counter()
    for _ in range(stream.samples_per_epoch()):
        (batch,) = loader.step(0, 1, 1)
        found.update(batch.inputs["targets_BT"][batch.inputs["weights_BT"] > 0].tolist())
    wanted = Counter(token for row in (spans(sets[0]) | spans(sets[1])).values() for token in row[1:])
    assert found == wanted


def test_it_is_one_source_of_a_mixture_and_resumes(sets, tmp_path):
    view, new = ReplayDataset(generation_of(*sets), sets), write_shards(tmp_path / "new", made_up_documents(90, seed=3))

    def stream():
        parts = [WeightedDataset(new, "new", 3), WeightedDataset(view, "replay", 1)]
        return Stream(parts, 16, 8, 0, 2, "document")

    whole, half = Loader(stream()), stream()
    before = [whole.step(0, 1, 4) for _ in range(6)]
    half.restore(json.loads(json.dumps(_state_after(stream(), 3))))
    loader = Loader(half)
    for step in range(3, 6):
        for one, other in zip(loader.step(0, 1, 4), before[step], strict=True):
            assert one.inputs["tokens_BT"].tolist() == other.inputs["tokens_BT"].tolist()
            assert one.sources == other.sources
    domains = np.concatenate([batch.domains_B for step in before for batch in step])
    assert np.bincount(domains).tolist() == [36, 12]
    assert any(name.startswith("replay-000000:") for step in before for batch in step for name in batch.sources)


def _state_after(stream, steps):
    loader = Loader(stream)
    for _ in range(steps):
        loader.step(0, 1, 8)
    return stream.state()


@pytest.mark.parametrize(
    ("objective", "length"),
    [
        (ObjectiveConfig(name="masked"), 32),
        (ObjectiveConfig(name="masked", pairs="next_sentence"), 32),
        (ObjectiveConfig(name="masked", pairs="sentence_order"), 32),
        (ObjectiveConfig(name="span_corruption"), 32),
    ],
)
def test_masks_pairs_and_spans_are_made_of_it(tmp_path, objective, length):
    dataset = write_sentences(tmp_path / "data", 80)
    view = ReplayDataset(generation_of(dataset), [dataset], block_rows=32)
    stream = Stream(view, length, 1, 0, 4, "document", objective=objective)
    loader, seen = Loader(stream), Counter()
    for _ in range(stream.samples_per_epoch()):
        (batch,) = loader.step(0, 1, 1)
        assert all(weight >= 0 for weight in batch.weights.values())
        seen.update(batch.sources)
    assert set(seen.values()) == {1}


def test_sentences_of_its_documents_are_those_of_the_sources(tmp_path):
    dataset = write_sentences(tmp_path / "data", 40)
    view = ReplayDataset(generation_of(dataset), [dataset], block_rows=8)
    by_hash = {shard.content_hash: number for number, shard in enumerate(dataset.index.shards)}
    for number in range(view.num_shards):
        documents, sentences = view.offsets(number)
        wanted = []
        for document, start in enumerate(documents[:-1].tolist()):
            entry = view.entry(number, document)
            bounds, of_source = dataset.offsets(by_hash[entry.content_hash])
            assert of_source is not None
            first = bounds[entry.document] + entry.span * SPAN
            inside = of_source[(of_source > first) & (of_source < first + entry.num_tokens)]
            wanted += [start, *(start + inside - first).tolist()]
        assert sentences is not None
        assert sentences.tolist() == [*wanted, int(documents[-1])]


def test_a_document_that_is_deleted_later_keeps_its_place(sets):
    generation = generation_of(*sets)
    gone = Tombstones({entry.content_hash: range(entry.num_documents) for entry in sets[0].index.shards})
    plain, view = ReplayDataset(generation, sets), ReplayDataset(generation, sets, gone)
    assert view.fingerprint == plain.fingerprint
    assert view.tombstones == gone
    # as `palimpsest forget` notes it in the data folder
    add_tombstones(sets[0].folder, gone)
    opened = ReplayDataset(generation, [TokenDataset(sets[0].folder), sets[1]])
    assert opened.tombstones == gone
    hashes = {shard.content_hash for shard in sets[0].index.shards}
    for number in range(view.num_shards):
        before, after = plain.shard(number), view.shard(number)
        assert before.documents.tolist() == after.documents.tolist()
        for document, (start, end) in enumerate(zip(before.documents[:-1], before.documents[1:], strict=True)):
            is_gone = view.entry(number, document).content_hash in hashes
            assert (after.is_forgotten(np.arange(start, end)) == is_gone).all()
            if is_gone:
                assert (after.tokens[start:end] == EOS).all()
            else:
                assert after.tokens[start:end].tolist() == before.tokens[start:end].tolist()


def test_remote_sources_are_fetched_and_verified(sets, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    remote = [TokenDataset(f"file://{dataset.location}", cache=cache) for dataset in sets]
    generation = generation_of(*sets)
    view, local = ReplayDataset(generation, remote, block_rows=16), ReplayDataset(generation, sets, block_rows=16)
    assert view.is_remote
    assert not local.is_remote
    stream = Stream(view, 16, 8, 0, 2, "document")
    wanted = stream.coming_shards()
    assert len(wanted) == 4
    for dataset, number in wanted:
        assert dataset is view
        view.fetch_ahead(number)
    assert {path.name.split(".")[0] for path in (tmp_path / "cache").iterdir()}
    assert view.stored_bytes(0) > 0 == local.stored_bytes(0)
    for number in range(view.num_shards):
        assert view.shard(number).tokens.tolist() == local.shard(number).tokens.tolist()
        view.release()


def test_a_damaged_source_shard_is_told_by_the_block(sets, tmp_path):
    view = ReplayDataset(generation_of(*sets), sets, block_rows=16)
    name = sets[0].index.shards[0].content_hash
    (tmp_path / "1" / sets[0].index.shards[0].tokens.file).write_bytes(b"")
    blocks = [number for number in range(view.num_shards) if name in dict(view._by_shard(number))]
    fresh = ReplayDataset(view.generation, [TokenDataset(tmp_path / "1"), sets[1]], block_rows=16)
    with pytest.raises(DamagedShard, match="truncated") as caught:
        fresh.shard(blocks[-1])
    assert caught.value.number == blocks[-1]


def test_rows_of_a_data_set_that_is_not_named_are_stale(sets, caplog):
    generation = generation_of(*sets)
    with pytest.raises(DataError, match="shards that are missing or have changed"):
        ReplayDataset(generation, sets[:1])
    view = ReplayDataset(generation, sets[:1], most_stale=1.0)
    assert view.index.num_tokens == sets[0].index.num_tokens
    assert "are not replayed" in caplog.text
    assert view.fingerprint != ReplayDataset(generation, sets).fingerprint


def test_an_empty_buffer_is_refused(sets):
    with pytest.raises(DataError, match="the reservoir is empty"):
        ReplayDataset(generation_of(*sets, capacity=0), sets)
    with pytest.raises(DataError, match="the reservoir is empty"):
        ReplayDataset(generation_of(), sets)


def test_data_sets_of_two_tokenizers_are_refused(sets, tmp_path):
    other = write_shards(tmp_path / "other", made_up_documents(5))
    tree = json.loads((tmp_path / "other" / FILE).read_text())
    other.index = replace(other.index, tokenizer_hash="another")
    assert tree["tokenizer_hash"] != "another"
    with pytest.raises(DataError, match="was written with tokenizer another"):
        ReplayDataset(generation_of(*sets), [*sets, other])


def test_no_target_of_a_deleted_document_counts(sets):
    generation = generation_of(*sets)
    gone = Tombstones({entry.content_hash: range(entry.num_documents) for entry in sets[0].index.shards})
    shape = (16, 1, 0, 4, "document")
    loaders = [Loader(Stream(ReplayDataset(generation, sets, deleted), *shape)) for deleted in (NO_TOMBSTONES, gone)]
    found = Counter()
    for _ in range(loaders[0].stream.samples_per_epoch()):
        (before,), (after,) = (loader.step(0, 1, 1) for loader in loaders)
        assert before.sources == after.sources
        found.update(after.inputs["targets_BT"][after.inputs["weights_BT"] > 0].tolist())
    assert found == Counter(token for row in spans(sets[1]).values() for token in row[1:])
