"""Pairs of nodes are measured in rounds, each pair once and no node twice at a time."""

import itertools

import pytest

from engine.parallel.bandwidth import pairings


@pytest.mark.parametrize("count", range(1, 10))
def test_each_two_meet_once_and_none_is_twice_in_a_round(count: int) -> None:
    rounds = pairings(count)
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert met == sorted(itertools.combinations(range(count), 2))
    for pairs in rounds:
        members = [member for pair in pairs for member in pair]
        assert len(members) == len(set(members))
    assert len(rounds) <= count
