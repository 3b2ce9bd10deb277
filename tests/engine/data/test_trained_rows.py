"""Rows of documents that were trained on, held to the tokens in the batches."""

import numpy as np
import pytest

from engine.config.schema.data import PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.replay.reservoir import Reservoir, Settings
from engine.data.replay.rows import documents_of, rows_of, spans_of
from engine.data.replay.view import ReplayDataset
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from engine.data.trained_rows import trained_rows
from tests.engine.data.corpus import EOS, made_up_documents, made_up_vocabulary, write_sentences, write_shards

SPAN = 8


def touched(stream, start, end, **share):
    return {
        (found.source, found.shard, document, span)
        for found in trained_rows(stream, start, end, SPAN, **share)
        for document, span in zip(documents_of(found.rows.inside), spans_of(found.rows.inside), strict=True)
    }


def numbered(folder, count=60, longest=30):
    """Documents whose every token tells which one it is (token = number + 1) and shards of some of them."""
    generator = np.random.default_rng(0)
    shape = (1000, EOS, "tokenizer-hash", 2 * 200, made_up_vocabulary())
    with ShardWriter(folder, *shape) as writer:
        for number in range(count):
            tokens = np.full(generator.integers(2, longest), number + 1)
            writer.add(np.append(tokens, EOS), np.array([0, tokens.size // 2]))
    return TokenDataset(folder)


OBJECTIVES: dict[str, tuple[ObjectiveConfig, PackingName, str]] = {
    "causal": (ObjectiveConfig(), "concatenate", "tokens_BT"),
    "whole documents": (ObjectiveConfig(), "best_fit", "tokens_BT"),
    "text": (ObjectiveConfig(name="span_corruption", rate=0.3), "concatenate", "tokens_BS"),
    "pairs": (ObjectiveConfig(name="masked", pairs="next_sentence", rate=0.15), "concatenate", "tokens_BT"),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_documents_are_those_whose_tokens_are_in_the_batches(tmp_path, name):
    objective, packing, key = OBJECTIVES[name]
    dataset = numbered(tmp_path)
    stream = Stream(dataset, 24, 5, 0, 2, "document", packing, objective)
    loader, firsts = Loader(stream), []
    for number in range(dataset.num_shards):
        firsts.append(sum(firsts and [dataset.index.shards[number - 1].num_documents]) + (firsts[-1] if firsts else 0))
    for _ in range(2):
        loader.step(0, 1, 5)
    start, seen = stream.progress.cursor, set()
    for _ in range(3):
        for batch in loader.step(0, 1, 5):
            found = batch.inputs[key].unique().tolist()
            decoder = batch.inputs["targets_BT"].unique().tolist() if name == "text" else []
            seen |= {token for token in [*found, *decoder] if 0 < token <= 60}
    rows = touched(stream, start, stream.position)
    assert {firsts[shard] + document + 1 for _, shard, document, _ in rows} >= seen
    extra = {firsts[shard] + document + 1 for _, shard, document, _ in rows} - seen
    # at most one for each of 15 rows: a document of which it has nothing but the end of text, or that is masked
    assert len(extra) <= 15


def test_spans_are_those_that_were_touched(tmp_path):
    dataset = write_shards(tmp_path, made_up_documents(40, longest=50), shard_tokens=300)
    stream = Stream(dataset, 10, 1, 0, 4, "document")
    loader, seen, start = Loader(stream), set(), stream.progress.cursor
    for _ in range(25):
        (batch,) = loader.step(0, 1, 1)
        name, row = batch.sources[0].split(":")
        number = [shard.tokens.name for shard in dataset.index.shards].index(name)
        offsets = dataset.offsets(number)[0]
        for token in range(int(row) * 10, min(int(row) * 10 + 10, int(offsets[-1]))):
            document = int(np.searchsorted(offsets, token, side="right")) - 1
            seen.add((0, number, document, (token - int(offsets[document])) // SPAN))
    assert touched(stream, start, stream.position) == seen


def test_shares_of_ranks_are_all_and_what_is_replayed_or_left_out_is_not_among_them(tmp_path):
    old, new = (write_shards(tmp_path / str(seed), made_up_documents(60, seed=seed)) for seed in (1, 2))
    reservoir = Reservoir(Settings(1000, 0))
    reservoir.add_domain("old", "f", 1)
    for number, shard in enumerate(old.index.shards):
        documents = np.arange(shard.num_documents)
        reservoir.admit("old", shard.content_hash, rows_of(documents, old.offsets(number)[0], 2048))
    view = ReplayDataset(reservoir.freeze(), [old])
    parts = [WeightedDataset(new, "new", 1), WeightedDataset(view, "replay", 1, is_replay=True)]
    stream = Stream(parts, 16, 8, 0, 2, "document")
    stream.leave_out(16, 40)
    start = stream.progress.cursor
    for _ in range(9):
        stream.skip()
    whole = touched(stream, start, stream.position)
    assert {source for source, *_ in whole} == {0}
    for size in (2, 3, 7):
        shares = [touched(stream, start, stream.position, position=rank, size=size) for rank in range(size)]
        assert set().union(*shares) == whole
    # all samples, those that are left out, too: more than what was trained on
    plain = Stream(parts, 16, 8, 0, 2, "document")
    assert whole < touched(plain, start, stream.position)


def test_sentences_are_no_documents(tmp_path):
    dataset = write_sentences(tmp_path, 40)
    stream = Stream(dataset, 32, 4, 0, 4, "document", objective=ObjectiveConfig(name="masked", pairs="sentence_order"))
    start = stream.progress.cursor
    while stream.progress.cursor.addresses[0].epoch == 0:
        stream.skip()
    rows = touched(stream, start, stream.samples_per_epoch())
    wanted = {
        (0, number, document)
        for number, shard in enumerate(dataset.index.shards)
        for document in range(shard.num_documents)
    }
    assert {row[:3] for row in rows} == wanted
