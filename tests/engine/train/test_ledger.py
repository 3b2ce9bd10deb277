"""Measures of hand-made loss matrices, against the formulas of the papers written out."""

import math

import pytest

from engine.train.ledger import (
    LossMatrix,
    average,
    backward_transfer,
    bits_per_byte,
    cost,
    forgetting,
    forward_transfer,
    measure,
    recovered_share,
)

MATRIX = LossMatrix(
    stages=("web", "law", "code"),
    domains=("web", "law", "code"),
    homes=(0, 1, 2),
    losses=((2.0, 4.0, 5.0), (2.5, 3.0, 4.5), (2.25, 3.5, 1.0)),
    first=(9.0, 8.0, 7.0),
)


def test_measures_of_three_stages():
    assert average(MATRIX) == pytest.approx((2.25 + 3.5 + 1.0) / 3)
    assert average(MATRIX, 1) == pytest.approx((2.5 + 3.0) / 2), "code is not there yet"
    # Lopez-Paz and Ranzato 2017: the mean over i < T of R[T, i] - R[i, i], the sign turned for losses.
    assert backward_transfer(MATRIX) == pytest.approx(((2.0 - 2.25) + (3.0 - 3.5)) / 2)
    # the mean over i > 1 of R[i-1, i] - b[i], the sign turned
    assert forward_transfer(MATRIX) == pytest.approx(((8.0 - 4.0) + (7.0 - 4.5)) / 2)
    assert forgetting(MATRIX) == pytest.approx((0.25 + 0.5) / 2)
    assert backward_transfer(MATRIX) == pytest.approx(-(0.25 + 0.5) / 2)


def test_measures_of_each_domain():
    web, law, code = measure(MATRIX)
    assert (web.home, web.loss, web.loss_at_home, web.gain) == ("web", 2.25, 2.0, 9.0 - 2.0)
    assert (web.forgetting_from_first, web.forgetting_from_best, web.forward_transfer) == (0.25, 0.25, None)
    assert (law.gain, law.forgetting_from_first, law.forward_transfer) == (4.0 - 3.0, 0.5, 8.0 - 4.0)
    assert (code.gain, code.forgetting_from_first, code.forward_transfer) == (4.5 - 1.0, 0.0, 7.0 - 4.5)


def test_forgetting_from_the_best_is_counted_from_a_later_stage_that_helped():
    matrix = LossMatrix(("a", "b", "c"), ("a",), (0,), ((2.0,), (1.5,), (1.75,)))
    [only] = measure(matrix)
    assert (only.forgetting_from_first, only.forgetting_from_best) == (-0.25, 0.25)
    assert forgetting(matrix, from_best=True) == 0.25
    assert backward_transfer(matrix) == 0.25


def test_a_single_stage_has_nothing_to_forget():
    matrix = LossMatrix(("a",), ("a",), (0,), ((2.0,),))
    assert (average(matrix), backward_transfer(matrix), forward_transfer(matrix), forgetting(matrix)) == (
        2.0,
        None,
        None,
        None,
    )
    [only] = measure(matrix)
    assert (only.gain, only.forgetting_from_first) == (None, 0.0)


def test_several_domains_of_one_stage():
    matrix = LossMatrix(("a", "b"), ("x", "y", "z"), (0, 0, 1), ((1.0, 2.0, 3.0), (1.5, 2.0, 1.0)))
    assert forgetting(matrix) == 0.25
    assert average(matrix, 0) == 1.5


def test_a_missing_number_makes_its_measures_unknown_and_no_others():
    matrix = LossMatrix(("a", "b"), ("x", "y"), (0, 1), ((None, 3.0), (1.5, 1.0)), (None, 9.0))
    x, y = measure(matrix)
    assert (x.gain, x.forgetting_from_first, x.forgetting_from_best) == (None, None, 0.0)
    assert (y.gain, y.forward_transfer) == (2.0, 6.0)
    assert (average(matrix), backward_transfer(matrix), forgetting(matrix)) == (1.25, None, None)


def test_the_share_that_replay_recovered_and_what_it_cost():
    assert recovered_share(0.1, 0.4) == pytest.approx(0.75)
    assert recovered_share(0.4, 0.4) == 0.0
    assert recovered_share(-0.1, 0.4) == pytest.approx(1.25), "better than before the stage"
    assert recovered_share(0.5, 0.4) == pytest.approx(-0.25), "replay can make it worse"
    assert (recovered_share(0.1, 0.0), recovered_share(0.1, None), recovered_share(None, 0.4)) == (None, None, None)
    assert cost(2.02, 2.0) == pytest.approx(0.01)
    assert (cost(1.0, None), cost(1.0, 0.0)) == (None, None)


def test_bits_per_byte():
    # A uniform distribution over 256 bytes, one token per byte: 8 bits per byte.
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 1000, 4000) == pytest.approx(2.0), "a token of four bytes"
    assert (bits_per_byte(1.0, 10, 0), bits_per_byte(None, 10, 10)) == (None, None)
