"""Weights of documents in a reservoir: a column of their shards, which `prepare --weight-key` writes."""

from __future__ import annotations

import numpy as np

COLUMN = "weight"
"""Name of the column that `prepare` writes."""
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
"""Bounds of weights, between which no key of a reservoir becomes 0 or infinite."""


def are_within_bounds(weights: np.ndarray) -> np.ndarray:
    """Return True for the weights (n,) that are numbers within the bounds, (n,) bool."""
    return (weights >= LEAST_WEIGHT) & (weights <= LARGEST_WEIGHT)
