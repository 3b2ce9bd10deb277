"""Rows on their way to the model: tokens with their documents, filled in by samplers, and the model's inputs.

B batch (rows), T sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class SampledRows:
    """The model's inputs by keyword, and what losses and metrics need to know of the rows."""

    inputs: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    """(B,) sum of the target weights of each row, by the name of the loss."""
    documents: np.ndarray
    """(B, T) int32 number of the document of each token within its row; padding has the last number."""


@dataclass(frozen=True)
class RowBuffer:
    """Rows that a sampler writes: their tokens, how many of them are real, and where documents begin.

    Example: two rows of T = 4, `totals_B` = [4, 2], documents that begin at (0, 0), (0, 3) and (1, 0) make
    `documents_BT` [[0, 0, 0, 1], [0, 0, 1, 1]]: the padding of the second row counts as a document of its own.
    """

    tokens_BT: np.ndarray
    totals_B: np.ndarray
    _begins: list[np.ndarray] = field(default_factory=list)
    """Positions in the flattened (B x T) tokens."""
    _forgotten: list[np.ndarray] = field(default_factory=list)
    """Positions of forgotten tokens, flattened likewise."""

    @classmethod
    def empty(cls, num_rows: int, length: int, padding_id: int) -> RowBuffer:
        """Return a buffer of padding rows."""
        return cls(np.full((num_rows, length), padding_id, np.int64), np.zeros(num_rows, np.int64))

    def write(self, row: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Write a row's tokens; documents begin at `starts` (the first one always begins at 0)."""
        self.tokens_BT[row, : tokens.size] = tokens
        self.begin(row, starts)
        self.totals_B[row] = tokens.size

    def begin(self, rows: np.ndarray | int, positions: np.ndarray) -> None:
        """Note where documents begin; all of them before they are asked for."""
        self._begins.append(rows * self.tokens_BT.shape[1] + positions)

    def forget(self, rows: np.ndarray | int, positions: np.ndarray) -> None:
        """Note tokens of forgotten documents, at which nothing is predicted."""
        self._forgotten.append(rows * self.tokens_BT.shape[1] + positions)

    @property
    def forgotten_BT(self) -> np.ndarray:
        """True for tokens of forgotten documents."""
        found = np.zeros(self.tokens_BT.size, bool)
        for positions in self._forgotten:
            found[positions] = True
        return found.reshape(self.tokens_BT.shape)

    @property
    def target_BT(self) -> np.ndarray:
        """True for tokens that may be predicted: all but padding and forgotten documents."""
        return self.real_BT & ~self.forgotten_BT if self._forgotten else self.real_BT

    @cached_property
    def real_BT(self) -> np.ndarray:
        """True for tokens, False for padding."""
        return np.arange(self.tokens_BT.shape[1]) < self.totals_B[:, None]

    @property
    def starts_BT(self) -> np.ndarray:
        """True for tokens at which documents begin."""
        starts = np.zeros(self.tokens_BT.size, bool)
        for begins in self._begins:
            starts[begins] = True
        return starts.reshape(self.tokens_BT.shape)

    @cached_property
    def documents_BT(self) -> np.ndarray:
        """Number of each token's document within its row, int32, from 0; padding is the last."""
        num_rows, length = self.tokens_BT.shape
        firsts_B = np.arange(0, num_rows * length, length)
        padded = np.flatnonzero((self.totals_B > 0) & (self.totals_B < length))
        # every flat position at which a row, a document or padding begins, each once and rising
        edges = np.unique(np.concatenate([firsts_B, *self._begins, (firsts_B + self.totals_B)[padded]]))
        # the number of an edge less that of its row's first edge: the number of the document within the row
        numbers = np.arange(edges.size) - edges.searchsorted(firsts_B)[edges // length]
        lengths = np.append(edges[1:], num_rows * length) - edges
        return numbers.astype(np.int32).repeat(lengths).reshape(num_rows, length)

    def padding_BT(self) -> np.ndarray:
        """Return 0 for tokens and 1 for the padding of rows that hold a token, (B, T) int32."""
        return (~self.real_BT & (self.totals_B > 0)[:, None]).astype(np.int32)
