"""Objectives: from a row of the corpus to inputs, targets and the weight of each target.

So far the causal one. A weight of 0 says "no target here"; the loss is the weighted sum over the global batch
divided by its global weight, so padding and document boundaries change no denominator. Pure functions of the row.

T time (sequence length).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.data.packing import Row

Attention = Literal["document", "row"]


def causal(row: Row, attention: Attention, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_T int64, targets_T int64, weights_T float32): each input predicts its successor.

    Padding has weight 0. With `attention` "document" so has a target that lies in another document than its
    input (what follows an end-of-text); with "row" it is a target like any other.
    """
    inputs = row.num_inputs
    tokens_T = np.full(row.length, padding_id, np.int64)
    targets_T = np.full(row.length, padding_id, np.int64)
    weights_T = np.zeros(row.length, np.float32)
    tokens_T[:inputs] = row.tokens[:-1]
    targets_T[:inputs] = row.tokens[1:]
    weights_T[:inputs] = 1.0
    if attention == "document":
        weights_T[row.starts - 1] = 0.0
    return tokens_T, targets_T, weights_T
