"""Pairs: every sentence once an epoch, second segments of other documents half of the time, two always fit a row."""

import numpy as np
import pytest

from engine.data.objectives.pairs import IN_ORDER, NONE, OTHER, Pairs, arrange, cut
from tests.engine.data.corpus import EOS, write_sentences


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("pairs"), 300, longest=14, shard_tokens=4000)


def samples_of(dataset, pairs, epoch):
    """(shard number, bounds, label, whether it counts) of every sample of an epoch."""
    for number in range(dataset.num_shards):
        for row in range(int(pairs.count(np.array([number]))[0])):
            yield number, *pairs.pair(number, row, epoch)


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
@pytest.mark.parametrize("capacity", [2, 9, 25, 61, 509])
def test_an_epoch_holds_every_token_of_text_once_and_nothing_is_cut_off(dataset, kind, capacity):
    pairs = Pairs(dataset, capacity, kind, seed=3)
    for epoch in range(2):
        seen = [np.zeros(dataset.shard(number).tokens.size, int) for number in range(dataset.num_shards)]
        for number, bounds, _, _ in samples_of(dataset, pairs, epoch):
            assert 1 <= sum(end - start for start, end in bounds) <= capacity
            for start, end in bounds:
                seen[number][start:end] += 1
        for number, counts in enumerate(seen):
            assert (counts == (dataset.shard(number).tokens != EOS)).all()


@pytest.mark.parametrize("capacity", [25, 61, 509])
def test_segments_begin_and_end_with_sentences_unless_one_is_longer_than_half_a_row(dataset, capacity):
    for number in range(dataset.num_shards):
        documents, sentences = dataset.offsets(number)
        edges = set(sentences.tolist()) | set((documents[1:] - 1).tolist())
        lengths = np.diff(sentences)
        if lengths.max() <= capacity // 2:
            assert set(cut(documents, sentences, capacity // 2).bounds.ravel().tolist()) <= edges


def test_long_sentences_are_cut_in_parts():
    found = cut(np.array([0, 24]), np.array([0, 3, 24]), limit=5)
    assert found.bounds.tolist() == [[0, 3], [3, 8], [8, 13], [13, 18], [18, 23]]
    assert (found.firsts.tolist(), found.lone.tolist()) == ([0, 2], [4])


def test_the_last_segment_of_an_odd_number_is_cut_at_the_sentence_nearest_its_middle():
    found = cut(np.array([0, 11]), np.array([0, 2, 4, 9, 11]), limit=50)
    assert found.bounds.tolist() == [[0, 9], [9, 10]]
    assert found.firsts.tolist() == [0]


def test_next_sentences_are_of_another_document_half_of_the_time(dataset):
    pairs = Pairs(dataset, 61, "next_sentence", seed=0)
    labels = []
    for number, bounds, label, counts in samples_of(dataset, pairs, 0):
        documents = dataset.shard(number).documents
        owners = [int(np.searchsorted(documents, start, side="right")) for start, _ in bounds]
        if not counts:
            assert len(bounds) == 1
            continue
        labels.append(label)
        assert (owners[0] != owners[1]) == (label == OTHER)
        if label == IN_ORDER:
            assert bounds[0][1] == bounds[1][0]
    assert np.mean(labels) == pytest.approx(0.5, abs=dataset.num_shards / len(labels))  # halves are rounded by shard


def test_orders_are_swapped_half_of_the_time(dataset):
    pairs = Pairs(dataset, 61, "sentence_order", seed=0)
    labels = []
    for _, bounds, label, counts in samples_of(dataset, pairs, 0):
        if not counts:
            assert (len(bounds), label) == (1, IN_ORDER)
            continue
        labels.append(label)
        assert (bounds[0][1] == bounds[1][0]) == (label == IN_ORDER)
        assert (bounds[1][1] == bounds[0][0]) == (label == OTHER)
    assert abs(np.mean(labels) - 0.5) < 4.5 * 0.5 / len(labels) ** 0.5


def test_epochs_and_seeds_exchange_differently_and_the_rest_is_the_same_everywhere(dataset):
    segments = Pairs(dataset, 61, "next_sentence", 0).segments(0)

    def seconds(seed, epoch):
        return tuple(arrange(segments, "next_sentence", seed, epoch, 0).second.tolist())

    assert len({seconds(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert seconds(1, 1) == seconds(1, 1)


def test_every_other_document_can_follow():
    """6 documents of 2 segments: over many epochs a second segment comes from each of the 5 others about as often."""
    documents = np.arange(0, 66, 11)
    sentences = np.unique(np.concatenate([documents, documents[:-1] + 5]))
    segments = cut(documents, sentences, limit=5)
    counts = np.zeros((5, 5))
    for epoch in range(3000):
        found = arrange(segments, "next_sentence", 0, epoch, 0)
        moved = found.labels == OTHER
        np.add.at(counts, (found.first[moved] // 2, found.second[moved] // 2), 1)
    assert not np.diag(counts).any()
    others = counts[~np.eye(5, dtype=bool)]
    # 2 of 5 samples are exchanged, each pair of documents in one epoch of ten: 300 expected, deviation 16
    assert np.abs(others - 300).max() < 4.5 * 17


def test_one_document_alone_or_one_that_is_most_of_a_shard_stays_in_order():
    alone = cut(np.array([0, 101]), np.arange(0, 102, 5).clip(max=101), limit=5)
    found = arrange(alone, "next_sentence", 0, 0, 0)
    assert not found.labels[found.second != NONE].any()
    most = cut(np.array([0, 101, 112, 123]), np.unique([*range(0, 101, 5), 101, 106, 112, 117, 123]), limit=5)
    for epoch in range(50):
        found = arrange(most, "next_sentence", 0, epoch, 0)
        owners = most.documents[found.first], most.documents[np.maximum(found.second, 0)]
        assert ((owners[0] != owners[1]) == (found.labels == OTHER))[found.second != NONE].all()
        assert np.unique(found.second[found.second != NONE]).size == (found.second != NONE).sum()


def test_documents_of_nothing_but_an_end_of_text_change_no_pair():
    """50 of them before six others: more numbers of documents than segments."""
    plain = np.arange(0, 77, 11)
    sentences = np.unique(np.concatenate([plain, plain[:-1] + 5]))
    empty = np.arange(50)
    before = cut(plain, sentences, limit=5)
    after = cut(np.concatenate([empty, plain + 50]), np.concatenate([empty, sentences + 50]), limit=5)
    for epoch in range(20):
        found, expected = (arrange(segments, "next_sentence", 0, epoch, 0) for segments in (after, before))
        for name in ("first", "second", "labels", "labelled"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
