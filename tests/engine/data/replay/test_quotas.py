"""Quotas: examples by hand, and the properties that cutting early relies on."""

import numpy as np
import pytest

from engine.data.replay.quotas import bounds, quotas, shares
from engine.errors import DataError

SIZES = {"books": 900, "code": 100, "web": 0}
MANY = dict.fromkeys(SIZES, 10**6)


@pytest.mark.parametrize(
    ("kind", "fixed", "wanted"),
    [
        ("uniform", None, {"books": 34, "code": 33, "web": 33}),
        ("proportional", None, {"books": 90, "code": 10, "web": 0}),
        ("square_root", None, {"books": 75, "code": 25, "web": 0}),
        ("fixed", {"books": 0.5, "web": 1.5}, {"books": 25, "code": 0, "web": 75}),
    ],
)
def test_kinds_by_hand(kind, fixed, wanted):
    assert quotas(100, shares(kind, SIZES, fixed), MANY) == wanted


def test_a_domain_that_has_less_gives_its_rest_to_the_others_in_their_proportions():
    share = {"a": 1, "b": 2, "c": 1}
    assert quotas(40, share, {"a": 4, "b": 100, "c": 100}) == {"a": 4, "b": 24, "c": 12}
    assert quotas(40, share, {"a": 4, "b": 5, "c": 6}) == {"a": 4, "b": 5, "c": 6}


def test_more_rows_never_raise_the_bounds_of_the_others_and_bounds_hold_the_quotas():
    generator = np.random.default_rng(0)
    for _ in range(500):
        names = "abcdef"[: generator.integers(1, 7)]
        share = {name: int(generator.integers(1, 50)) for name in names}
        few = {name: int(generator.integers(0, 60)) for name in names}
        more = {name: few[name] + int(generator.integers(0, 60)) for name in names}
        capacity = int(generator.integers(0, 200))
        given = quotas(capacity, share, more)
        assert sum(given.values()) == min(capacity, sum(more.values()))
        before, after = bounds(capacity, share, few), bounds(capacity, share, more)
        for name in names:
            assert given[name] <= after[name] <= more[name]
            # what was cut off before is wanted neither now nor ever: all that is wanted was kept
            assert min(after[name], few[name]) <= before[name]


@pytest.mark.parametrize("fixed", [{"books": -1.0}, {"books": float("nan")}])
def test_wrong_fixed_shares_are_refused(fixed):
    with pytest.raises(DataError, match="fixed shares of the reservoir"):
        shares("fixed", SIZES, fixed)


def test_a_domain_without_a_share_has_no_row():
    assert quotas(10, shares("fixed", SIZES, {"other": 1.0}), MANY) == dict.fromkeys(SIZES, 0)
    assert bounds(10, shares("fixed", SIZES, {"books": 1.0}), MANY) == {"books": 11, "code": 0, "web": 0}
