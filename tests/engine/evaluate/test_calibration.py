"""Calibration against numbers worked out by hand, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from engine.evaluate.calibration import (
    bins,
    calibration_of,
    expected_error,
    fitted_temperature,
    negative_log_likelihood,
    softmax,
)


def test_the_error_of_four_predictions_by_hand():
    """Two at 0.95, one of them right; two at 0.60 (on the border of bin 9), both right."""
    shares_NC = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.6, 0.4]])
    expected_N = np.array([0, 1, 0, 0])
    assert expected_error(shares_NC, expected_N) == pytest.approx((2 * 0.45 + 2 * 0.4) / 4)
    assert [(one["count"], one["accuracy"]) for one in bins(shares_NC, expected_N)] == [(2, 1.0), (2, 0.5)]


def test_the_error_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    logits_NC, expected_N = 3 * rng.normal(size=(500, 4)).astype(np.float32), rng.integers(4, size=500)
    shares_NC = softmax(logits_NC)
    total = 0.0
    for k in range(15):
        inside = [n for n in range(500) if k / 15 < shares_NC[n].max() <= (k + 1) / 15]
        if inside:
            accuracy = np.mean([shares_NC[n].argmax() == expected_N[n] for n in inside])
            total += len(inside) / 500 * abs(accuracy - np.mean([shares_NC[n].max() for n in inside]))
    assert expected_error(shares_NC, expected_N) == pytest.approx(total, abs=1e-12)
    assert shares_NC.sum(1) == pytest.approx(1)


def test_the_temperature_is_that_of_the_least_cross_entropy():
    """Logits that are three times too large for the labels drawn from them need a temperature of three."""
    rng = np.random.default_rng(1)
    true_NC = rng.normal(size=(4000, 3))
    expected_N = np.array([rng.choice(3, p=row) for row in softmax(true_NC)])
    found = fitted_temperature(3 * true_NC, expected_N)
    grid = np.linspace(1, 6, 501)
    best = grid[int(np.argmin([negative_log_likelihood(3 * true_NC, expected_N, each) for each in grid]))]
    assert found == pytest.approx(best, abs=0.01)
    assert found == pytest.approx(3, rel=0.1)
    told = calibration_of(3 * true_NC, expected_N)
    assert told["temperature"]["ece_after"] < told["temperature"]["ece_before"] / 2
    assert told["temperature"]["fitted_on"] == 2000


def test_one_example_has_no_temperature():
    assert "temperature" not in calibration_of(np.array([[1.0, 2.0]]), np.array([1]))
