"""Near duplicates against the sets themselves: the threshold is Jaccard's similarity, within what bands may miss."""

import numpy as np
import pytest

from engine.corpus import near_duplicates
from engine.corpus.assemble import Corpus, EncodedFile, removed
from engine.corpus.encoded_chunks import Documents, EncodedChunk, save
from engine.corpus.minhash import (
    NUM_PERMUTATIONS,
    RECALL,
    RUN,
    band_keys,
    candidates,
    rows_per_band,
    runs,
    signatures,
    similarity,
)
from engine.corpus.pool import Pool
from engine.corpus.spread import stored_order
from engine.errors import DataError

pytest.importorskip("rensa")

EOS = 0


def run_set(ids):
    width = min(RUN, ids.size)
    return {tuple(ids[at : at + width].tolist()) for at in range(ids.size - width + 1)}


def jaccard(a, b):
    return len(run_set(a) & run_set(b)) / len(run_set(a) | run_set(b))


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


def pairs_of_similarity(count, common, distinct, seed=0):
    """Documents and, behind all of them, their variants: `common` runs of 2 x `distinct` + `common` are the same."""
    generator = np.random.default_rng(seed)
    firsts, seconds = [], []
    for _ in range(count):
        shared = generator.integers(1, 60_000, common + RUN - 1)
        firsts.append(np.append(shared, generator.integers(1, 60_000, distinct)))
        seconds.append(np.append(shared, generator.integers(1, 60_000, distinct)))
    return firsts + seconds


def corpus_of(documents, folder, threshold):
    """The documents as a corpus of two parts."""
    parts = []
    half = (len(documents) + 1) // 2
    for number, some in enumerate((documents[:half], documents[half:])):
        count = len(some)
        zeros = np.zeros(count, np.int64)
        known = Documents(
            lengths=np.array([item.size + 1 for item in some], np.int64),
            hashes=np.arange(2 * count, dtype=np.uint64).reshape(count, 2) + np.uint64(10**6 * number),
            is_validation=np.zeros(count, bool),
            text_bytes=zeros,
            unknown=zeros,
            unspelt=zeros,
            sentences=zeros,
            id_bytes=zeros,
            id_hashes=np.empty((0, 2), np.uint64),
            empty=np.array(0),
            empty_unspelt=np.array(0),
        )
        tokens = np.concatenate([np.append(item, EOS) for item in some]) if some else np.empty(0)
        part = EncodedChunk(known, band_keys(some, threshold), tokens.astype("<u2"), np.empty(0, np.int64))
        path = folder / f"{number}.part"
        save(path, part, stored_order((number, 0), known.is_validation))
        parts.append(EncodedFile(path, (number, 0), "", known, part.bands))
    return Corpus(parts, np.dtype("<u2"))


def left_out(documents, folder, threshold):
    corpus = corpus_of(documents, folder, threshold)
    return removed(corpus, "near", threshold, Pool(1), lambda done, total: None).near


def test_minima_estimate_jaccards_similarity():
    documents = variants()
    made = signatures(documents)
    for a in range(len(documents)):
        for b in range(a):
            true = jaccard(documents[a], documents[b])
            # a mean of 128 draws of probability `true`: five standard deviations, and 32-bit minima that collide
            allowed = 5 * (true * (1 - true) / NUM_PERMUTATIONS) ** 0.5 + 1e-3
            assert abs(np.mean(made[a] == made[b]) - true) <= allowed


def test_keys_follow_the_document_alone():
    documents = [np.array([5]), *variants(), np.arange(4)]
    together = band_keys(documents, 0.8)
    alone = [band_keys([document], 0.8)[0] for document in documents]
    assert np.array_equal(together, np.stack(alone))
    assert band_keys([], 0.8).shape == (0, together.shape[1])


def test_the_exact_similarity_is_that_of_the_sets():
    documents = variants(3)
    hashes = [np.unique(runs(ids)) for ids in documents]
    for a in range(len(documents)):
        for b in range(a):
            assert similarity(hashes[a], hashes[b]) == jaccard(documents[a], documents[b])


def test_what_has_an_earlier_near_duplicate_is_left_out(tmp_path):
    documents = variants()
    gone = left_out(documents, tmp_path, 0.8)
    expected = [any(jaccard(documents[a], documents[b]) >= 0.8 for a in range(b)) for b in range(len(documents))]
    assert gone.tolist() == expected
    assert 4 < gone.sum() < 12


def test_a_document_between_two_others_does_not_join_them(tmp_path):
    """Of a, c, b, where b is near both, but a and c are not near each other, b alone goes."""
    generator = np.random.default_rng(1)
    a = generator.integers(1, 60_000, 1000)
    b, c = a.copy(), a.copy()
    b[:80], c[:160] = generator.integers(1, 60_000, 80), generator.integers(1, 60_000, 160)
    c[:80] = b[:80]
    assert jaccard(a, c) < 0.8 <= min(jaccard(a, b), jaccard(b, c))
    assert left_out([a, c, b], tmp_path, 0.8).tolist() == [False, False, True]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_the_threshold_means_what_it_says(tmp_path, threshold):
    """None of the pairs 0.01 below it, and all but what bands may miss of those at it. 200 pairs each."""
    count, union = 200, 500
    for offset, least, most in ((-0.01, 0, 0), (0.0, RECALL, 1), (0.03, RECALL, 1)):
        common = round((threshold + offset) * union)
        documents = pairs_of_similarity(count, common, (union - common) // 2)
        found = jaccard(documents[0], documents[count])
        assert abs(found - (threshold + offset)) < 3e-3
        if offset == 0 and found < threshold:
            continue  # rounding of the halves
        gone = left_out(documents, tmp_path, threshold)
        assert not gone[:count].any()
        share = gone[count:].mean()
        # binomial: five standard deviations below the least probability
        assert least - 5 * (least * (1 - least) / count) ** 0.5 <= share <= most


def test_batches_of_any_size_and_bands_in_turn_decide_the_same(tmp_path, monkeypatch):
    documents = [item for seed in range(6) for item in variants(seed)]
    expected = left_out(documents, tmp_path, 0.7)
    monkeypatch.setattr(near_duplicates, "_TOKENS_AT_ONCE", 1)
    assert np.array_equal(left_out(documents, tmp_path, 0.7), expected)


def test_no_pair_is_compared_twice(tmp_path, monkeypatch):
    seen = []
    real = near_duplicates.compare

    def compare(task):
        seen.extend(map(tuple, task.numbers_P2.tolist()))
        return real(task)

    monkeypatch.setattr(near_duplicates, "compare", compare)
    left_out(variants(), tmp_path, 0.8)
    assert len(seen) == len(set(seen)) > 0


def test_a_damaged_part_is_told_while_comparing(tmp_path):
    corpus = corpus_of(variants(), tmp_path, 0.8)
    (tmp_path / "0.part").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"0\.part is damaged or gone"):
        removed(corpus, "near", 0.8, Pool(1), lambda done, total: None)


def test_candidates_are_pairs_of_one_key_with_the_first_and_the_one_before():
    keys = np.array([7, 9, 7, 9, 7, 3], np.uint64)
    assert candidates(keys).tolist() == [[0, 2], [0, 4], [1, 3], [2, 4]]
    assert candidates(np.empty(0, np.uint64)).tolist() == []


def test_bands_see_pairs_at_the_threshold():
    assert rows_per_band(0.8) == 6
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= RECALL


def test_few_documents_have_no_duplicates(tmp_path):
    for count in (1, 2):
        documents = variants()[: 4 * count : 4]
        assert not left_out(documents, tmp_path, 0.8).any()
    nothing = removed(corpus_of(variants(), tmp_path, 0.8), "none", 0.8, Pool(1), lambda done, total: None)
    assert not nothing.any.any()
