"""The reservoir: one state whatever the split, the order and the repeats; draws as the closed forms say."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.data.replay.keys import row_keys
from engine.data.replay.reservoir import Reservoir, Settings, united
from engine.data.shards.tombstones import Tombstones
from engine.errors import DataError
from tests.engine.data.replay.made_up import ROWS, SHARDS, admissions, all_rows, content, name_of, new


@pytest.mark.parametrize("quota", ["uniform", "proportional", "square_root"])
@pytest.mark.parametrize(("weighted", "pure"), [(False, True), (True, True), (True, False)])
def test_any_split_order_and_repeats_give_equal_bytes(quota, weighted, pure):
    found = []
    for world, seed in itertools.product((1, 2, 3, 7), (0, 1)):
        generator = np.random.default_rng([world, seed])
        ranks = [new(quota=quota, pure=pure) for _ in range(world)]
        for number, admission in enumerate(admissions(generator, weighted)):
            ranks[number % world].admit(*admission)
            if generator.random() < 0.3:
                ranks[number % world].settle()
        generator.shuffle(ranks)
        found.append(content(united(ranks)))
    assert all(one == found[0] for one in found)


def test_it_holds_what_sorting_all_rows_by_their_keys_gives():
    reservoir = new(capacity=300)
    for admission in admissions(np.random.default_rng(0)):
        reservoir.admit(*admission)
    generation, rows = reservoir.freeze(), all_rows()
    assert {name: domain.size for name, domain in generation.domains.items()} == {"books": 180, "code": 90, "web": 30}
    for domain, shards in SHARDS.items():
        keyed = [
            (key, name_of(number), inside)
            for number in shards
            for key, inside in zip(
                row_keys(3, name_of(number), rows.inside).tolist(), rows.inside.tolist(), strict=True
            )
        ]
        row_ids = generation.domains[domain].row_ids.tolist()
        kept = [(generation.shards[row_id >> 44], row_id % 2**44) for row_id in row_ids]
        assert kept == [entry[1:] for entry in sorted(keyed)[: len(kept)]]


def test_a_row_that_comes_with_two_weights_has_its_smaller_key_in_any_order():
    rows = all_rows(50)
    weights = np.random.default_rng(0).random((2, 50)) + 0.1
    found = []
    for order in ((0, 1), (1, 0), (0, 1, 0)):
        reservoir = new(capacity=10_000, pure=False)
        for which in order:
            reservoir.admit("web", name_of(9), rows, weights[which])
            reservoir.settle()
        found.append(content(reservoir))
    assert found[0] == found[1] == found[2]
    assert sorted(np.frombuffer(found[0][0][2][1])) == sorted(
        (row_keys(3, name_of(9), rows.inside, weights.max(axis=0))).tolist()
    )


def test_ties_are_broken_by_hash_and_row(monkeypatch):
    monkeypatch.setattr(
        "engine.data.replay.reservoir.row_keys", lambda seed, name, inside, weights: (inside % np.uint64(3)) / 8.0
    )
    found = []
    for seed in range(4):
        reservoir = new(capacity=77)
        for admission in admissions(np.random.default_rng(seed)):
            reservoir.admit(*admission)
            reservoir.settle()
        found.append(content(reservoir))
    assert all(one == found[0] for one in found)
    for _, keys, row_ids in found[0][0]:
        assert list(zip(np.frombuffer(keys), row_ids, strict=True)) == sorted(
            zip(np.frombuffer(keys), row_ids, strict=True)
        )


def test_every_row_is_as_likely_as_every_other():
    rows, counts = all_rows(40), np.zeros(40)
    for seed in range(2000):
        reservoir = new(capacity=8, seed=seed, quota="fixed", fixed={"web": 1.0})
        reservoir.admit("web", name_of(9), rows)
        counts[(reservoir.freeze().domains["web"].row_ids >> np.uint64(16)).astype(int) % 2**28] += 1
    # 2000 draws of 8 out of 40: 400 each. Chi-square of 39 degrees of freedom: above 85 with a probability of 3e-5
    assert counts.sum() == 2000 * 8
    assert ((counts - 400) ** 2 / 400).sum() < 85


def test_weighted_rows_are_included_as_sampling_one_after_the_other_has_it():
    weights, rows, draws = np.array([1.0, 2.0, 3.0, 6.0]), all_rows(4), 6000
    counts: dict[frozenset[int], int] = {}
    for seed in range(draws):
        reservoir = new(capacity=2, seed=seed, quota="fixed", fixed={"web": 1.0})
        reservoir.admit("web", name_of(9), rows, weights)
        chosen = frozenset((reservoir.freeze().domains["web"].row_ids >> np.uint64(16)).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    # the closed form: i first, then j out of the rest, or the other way round
    p, total = weights / weights.sum(), 0.0
    for i, j in itertools.combinations(range(4), 2):
        wanted = draws * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))
        total += (counts.get(frozenset((i, j)), 0) - wanted) ** 2 / wanted
    assert total < 26  # chi-square of 5 degrees of freedom, 1e-4


def test_shrinking_leaves_the_first_rows_of_each_domain():
    reservoir, small = new(capacity=500), new(capacity=120)
    for admission in admissions(np.random.default_rng(0)):
        reservoir.admit(*admission)
        small.admit(*admission)
    before = reservoir.freeze()
    reservoir.shrink(120)
    after = reservoir.freeze()
    for name, domain in after.domains.items():
        wanted = [(before.shards[row_id >> 44], row_id % 2**44) for row_id in before.domains[name].row_ids.tolist()]
        kept = [(after.shards[row_id >> 44], row_id % 2**44) for row_id in domain.row_ids.tolist()]
        assert kept == wanted[: len(kept)]
    assert after.num_rows == 120
    assert content(reservoir) == content(small)


def test_a_deleted_document_is_not_taken_in_and_goes_out():
    gone = Tombstones({name_of(number): range(0, ROWS, 2) for number in range(10)})
    reservoir, later = new(tombstones=gone), new(capacity=4000)
    for admission in admissions(np.random.default_rng(0)):
        reservoir.admit(*admission)
        later.admit(*admission)
    # merged from a rank that did not know of the deletion
    rank = new()
    rank.admit("web", name_of(9), all_rows())
    reservoir.merge(rank)
    later.settle()
    assert later.drop(gone) == 2000
    later.admit("web", name_of(9), all_rows())
    for one in (reservoir, later):
        for domain in one.freeze().domains.values():
            assert domain.size
            assert not ((domain.row_ids >> np.uint64(16)) % np.uint64(2) == 0).any()


def test_a_reservoir_for_a_rank_takes_what_may_still_enter():
    whole, reservoir = new(capacity=60), new(capacity=60)
    pieces = admissions(np.random.default_rng(0))
    for admission in pieces:
        whole.admit(*admission)
    for admission in pieces[: 3 * len(pieces) // 4]:
        reservoir.admit(*admission)
    rank = reservoir.empty()
    for admission in pieces[3 * len(pieces) // 4 :]:
        rank.admit(*admission)
    rank.settle()
    assert 0 < rank.num_rows < 45  # alone it would keep 60 or more
    reservoir.merge(rank)
    assert content(reservoir) == content(whole)


def test_a_new_domain_changes_quotas_from_then_on():
    reservoir = Reservoir(Settings(100, 0, "uniform"))
    reservoir.add_domain("books", "f", 10)
    reservoir.admit("books", name_of(0), all_rows())
    assert reservoir.freeze().domains["books"].size == 100
    reservoir.add_domain("code", "f", 10)
    reservoir.admit("code", name_of(6), all_rows(30))
    assert [domain.size for domain in reservoir.freeze().domains.values()] == [70, 30]
    reservoir.admit("code", name_of(7), all_rows())
    assert [domain.size for domain in reservoir.freeze().domains.values()] == [50, 50]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_out_of_bounds_is_refused(weight):
    with pytest.raises(DataError, match=f"has weight {weight}"):
        new().admit("web", name_of(9), all_rows(2), np.array([1.0, weight]))


def test_a_generation_stays_while_rows_are_admitted():
    reservoir = new()
    reservoir.admit("books", name_of(0), all_rows())
    generation = reservoir.freeze()
    before = generation.hash
    reservoir.admit("books", name_of(1), all_rows())
    assert reservoir.freeze().hash != before == replace(generation).hash


def test_stale_shards_are_counted_and_refused_beyond_a_limit(caplog):
    reservoir = new(capacity=2000, quota="uniform")
    for number in (0, 1):
        reservoir.admit("books", name_of(number), all_rows())
    reservoir.admit("web", name_of(9), all_rows(4))
    generation = reservoir.freeze()
    known = {name_of(0), name_of(1)}
    found = generation.without_stale(known)
    assert found.num_rows == 800
    assert "4 of 804 rows are not replayed: their 1 shards are missing or have changed" in caplog.text
    assert found.shards == tuple(sorted(known))
    assert generation.without_stale({*known, name_of(9)}) is generation
    with pytest.raises(DataError, match=r"404 of the 804 rows to replay are in 2 shards that are missing") as caught:
        generation.without_stale({name_of(0)})
    assert caught.value.allowed == "5% of the rows at most"
