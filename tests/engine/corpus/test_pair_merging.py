"""Joins are those of byte-pair encoding counted anew after every step."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from engine.corpus.pair_merging import PairMerger


def counted_anew(words: dict[tuple[str, ...], int], num_joins: int) -> tuple[list[tuple[str, str, int]], Counter[str]]:
    """The same by the book: all pairs are counted after each join; also the tokens that are left."""
    held = [(list(word), count) for word, count in words.items()]
    joins = []
    for _ in range(num_joins):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in held:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < 2:
            break
        one, two = min(pairs, key=lambda pair: (-pairs[pair], pair))
        joins.append((one, two, pairs[one, two]))
        for word, _ in held:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (one, two):
                    word[at : at + 2] = [one + two]
                at += 1
    left: Counter[str] = Counter()
    for word, count in held:
        for token in word:
            left[token] += count
    return joins, left


@pytest.mark.parametrize("seed", range(8))
def test_joins_are_those_of_counting_anew(seed):
    generator = random.Random(seed)
    words = {tuple(generator.choices("abc", k=generator.randint(1, 9))): generator.randint(1, 5) for _ in range(40)}
    expected, left = counted_anew(words, 25)
    merger = PairMerger(words, lambda a, b: a + b)
    found = [(one.left, one.right, one.count) for one in itertools.islice(merger.joins(), 25)]
    assert found == expected
    made = {a + b for a, b, _ in found}
    assert {token: merger.occurrences[token] for token in made} == {token: left[token] for token in made}
    assert merger.num_in_use == sum(left[token] > 0 for token in made)


def test_a_pair_that_may_not_be_joined_stays_and_a_single_one_is_no_pattern():
    merger = PairMerger({("a", "b", "c"): 5, ("x", "y"): 1}, lambda a, b: None if a == "a" else a + b)
    assert [one.joined for one in merger.joins()] == ["bc"]
