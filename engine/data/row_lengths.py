"""Rows of several lengths (`data.row_lengths`): the length of a step's rows.

The rows of all ranks and micro-batches of a step are equally long: the shortest of a few lengths that holds the longest
example of the step. So a step's samples and its length are the same in every layout. What a row is shorter by is
padding, which no token sees and no target is in: losses are those of rows padded to `sequence_length`.
"""

from __future__ import annotations

import numpy as np

from engine.data.shards.dataset import TokenDataset


def example_lengths(dataset: TokenDataset, shard_rows_N2: np.ndarray) -> np.ndarray:
    """Return the tokens of the examples at (shard, row), each a document, (N,) int64. Raises `DataError` where offsets
    are damaged."""
    lengths_N = np.empty(len(shard_rows_N2), np.int64)
    for number in np.unique(shard_rows_N2[:, 0]).tolist():
        mine = shard_rows_N2[:, 0] == number
        rows = shard_rows_N2[mine, 1]
        documents, _ = dataset.offsets(number)
        lengths_N[mine] = documents[rows + 1] - documents[rows]
    return lengths_N


def needed_lengths(dataset: TokenDataset, lengths: tuple[int, ...], most: int, shard_rows_N2: np.ndarray) -> np.ndarray:
    """Return the shortest of rising `lengths` and of `most` that holds the example at each (shard, row), (N,) int64.

    Raises `DataError` where offsets are damaged.
    """
    places_N = np.searchsorted(lengths, example_lengths(dataset, shard_rows_N2))
    return np.array([*lengths, most], np.int64)[places_N]


def fitting(longest: int, lengths: tuple[int, ...], most: int) -> int:
    """Return the shortest of the rising `lengths` and of `most` that holds so many tokens."""
    return next((length for length in lengths if length >= longest), most)
