"""MinHash against the sets themselves: estimates near Jaccard's similarity, groups those of brute force."""

import numpy as np
import pytest

from engine.data.preparation.near_duplicates import NUM_PERMUTATIONS, RUN, near_duplicates, rows_per_band, signatures

pytest.importorskip("rensa")


def runs(ids):
    width = min(RUN, ids.size)
    return {tuple(ids[at : at + width].tolist()) for at in range(ids.size - width + 1)}


def jaccard(a, b):
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def variants(seed=0):
    """Documents, each followed by copies in which some share of the tokens is another."""
    generator = np.random.default_rng(seed)
    found = []
    for length in (20, 100, 400, 1500):
        base = generator.integers(1, 3000, length)
        for share in (0.0, 0.005, 0.02, 0.1):
            changed = np.where(generator.random(length) < share, generator.integers(1, 3000, length), base)
            found.append(changed)
    return found


def test_estimates_are_jaccards():
    documents = variants()
    made = signatures(documents, NUM_PERMUTATIONS)
    for a in range(len(documents)):
        for b in range(a):
            true = jaccard(documents[a], documents[b])
            # a mean of 128 draws of probability `true`: five standard deviations, and 32-bit minima that collide
            allowed = 5 * (true * (1 - true) / NUM_PERMUTATIONS) ** 0.5 + 1e-3
            assert abs(np.mean(made[a] == made[b]) - true) <= allowed


def test_signatures_follow_the_document_alone():
    documents = [np.array([5]), *variants(), np.arange(4)]
    together = signatures(documents, NUM_PERMUTATIONS)
    alone = [signatures([document], NUM_PERMUTATIONS)[0] for document in documents]
    assert np.array_equal(together, np.stack(alone))
    assert signatures([], NUM_PERMUTATIONS).shape == (0, NUM_PERMUTATIONS)


def test_the_first_of_each_group_stays():
    documents = variants()
    gone = near_duplicates(signatures(documents, NUM_PERMUTATIONS), 0.8)
    made = signatures(documents, NUM_PERMUTATIONS)
    # brute force: all pairs whose estimate reaches the threshold, joined
    group = list(range(len(documents)))
    for a in range(len(documents)):
        for b in range(a):
            if np.mean(made[a] == made[b]) >= 0.8:
                group = [min(group[a], group[b]) if item in (group[a], group[b]) else item for item in group]
    assert gone.tolist() == [group[i] != i for i in range(len(documents))]
    assert 4 < gone.sum() < 12


def test_bands_see_pairs_at_the_threshold():
    assert rows_per_band(0.8) == 6
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= 0.99


def test_few_documents_have_no_duplicates():
    for count in (0, 1):
        assert near_duplicates(np.zeros((count, NUM_PERMUTATIONS), np.uint32), 0.8).tolist() == [False] * count
