"""Calibration of a classifier: does it err as often as its probabilities say?

Expected calibration error (Naeini et al. 2015; as in Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3):
predictions are put into bins of equal width by the probability of the predicted label; the error is the mean over the
predictions of |accuracy - mean probability| of their bin. The bins are those of a reliability diagram. Temperature
scaling (Guo et al. 2017, section 4.2) divides all logits by one number; here it is fitted on every other example and
judged on the rest.

Legend: N examples, C labels, K bins.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""
_TEMPERATURES = (0.05, 20.0)
_ITERATIONS = 60


def calibration_of(logits_NC: np.ndarray, expected_N: np.ndarray) -> dict[str, Any]:
    """Return the calibration of predictions; `expected_N` are the numbers of the right labels."""
    shares_NC = softmax(logits_NC)
    found = {
        "ece": expected_error(shares_NC, expected_N),
        "max_error": max((abs(one["accuracy"] - one["confidence"]) for one in bins(shares_NC, expected_N)), default=0),
        "brier": float(np.mean(((shares_NC - np.eye(shares_NC.shape[1])[expected_N]) ** 2).sum(1))),
        "nats": negative_log_likelihood(logits_NC, expected_N, 1.0),
        "accuracy": float(np.mean(shares_NC.argmax(1) == expected_N)),
        "confidence": float(shares_NC.max(1).mean()),
        "bins": bins(shares_NC, expected_N),
    }
    fit, rest = slice(0, None, 2), slice(1, None, 2)
    if len(expected_N[rest]):
        temperature = fitted_temperature(logits_NC[fit], expected_N[fit])
        found["temperature"] = {
            "value": temperature,
            "fitted_on": len(expected_N[fit]),
            "ece_before": expected_error(shares_NC[rest], expected_N[rest]),
            "ece_after": expected_error(softmax(logits_NC[rest] / temperature), expected_N[rest]),
        }
    return found


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits, fp64."""
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True)
    return np.exp(shifted_NC) / np.exp(shifted_NC).sum(1, keepdims=True)


def bins(shares_NC: np.ndarray, expected_N: np.ndarray) -> list[dict[str, float]]:
    """Return the bins that hold a prediction: their edges, number of predictions, accuracy and mean probability."""
    confidence_N, right_N = shares_NC.max(1), shares_NC.argmax(1) == expected_N
    # bins (0, 1/15], (1/15, 2/15], ...: as in the paper, a border belongs to the bin below it
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        {
            "from": k / BINS,
            "to": (k + 1) / BINS,
            "count": int((bin_N == k).sum()),
            "accuracy": float(right_N[bin_N == k].mean()),
            "confidence": float(confidence_N[bin_N == k].mean()),
        }
        for k in sorted({*bin_N.tolist()})
    ]


def expected_error(shares_NC: np.ndarray, expected_N: np.ndarray) -> float:
    """Return the expected calibration error, from 0 to 1."""
    found = bins(shares_NC, expected_N)
    return sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in found) / len(expected_N)


def negative_log_likelihood(logits_NC: np.ndarray, expected_N: np.ndarray, temperature: float) -> float:
    """Return the mean cross entropy of logits divided by a temperature, in nats."""
    scaled_NC = logits_NC.astype(np.float64) / temperature
    highest_N1 = scaled_NC.max(1, keepdims=True)
    total_N = highest_N1[:, 0] + np.log(np.exp(scaled_NC - highest_N1).sum(1))
    return float(np.mean(total_N - scaled_NC[np.arange(len(expected_N)), expected_N]))


def fitted_temperature(logits_NC: np.ndarray, expected_N: np.ndarray) -> float:
    """Return the temperature, from 0.05 to 20, of the least cross entropy.

    The cross entropy is convex in 1 / temperature, so that its derivative there has one root at most, found by halving.
    """
    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    for _ in range(_ITERATIONS):
        middle = math.sqrt(low * high)
        if _slope(logits_NC.astype(np.float64), expected_N, middle) > 0:
            high = middle
        else:
            low = middle
    return 1 / math.sqrt(low * high)


def _slope(logits_NC: np.ndarray, expected_N: np.ndarray, inverse: float) -> float:
    """Return the derivative of the mean cross entropy of `inverse` times the logits, by `inverse`."""
    mean_N = (softmax(inverse * logits_NC) * logits_NC).sum(1)
    return float(np.mean(mean_N - logits_NC[np.arange(len(expected_N)), expected_N]))
