"""The causal objective: each token predicts its successor.

B batch (rows), T sequence length, W tokens of a row and one more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.best_fit import BestFit
from engine.data.objectives.packing import Concatenation, Packing, Row
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import SamplerContext
from engine.data.tokenizer.vocabulary import Vocabulary


class _Read(NamedTuple):
    """Rows as they were read. Documents begin at (`start_rows`, `starts`); (`end_rows`, `ends`) are the positions whose
    successor is in another document. `forgotten_BT` is True for targets in forgotten documents; None without any."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    totals_B: np.ndarray
    start_rows: np.ndarray
    starts: np.ndarray
    end_rows: np.ndarray
    ends: np.ndarray
    forgotten_BT: np.ndarray | None = None


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> None:
    """Return None: any tokenizer has the end of the text, and nothing else is needed."""
    del vocabulary, sequence_length, objective


def make_sampler(context: SamplerContext) -> CausalSampler:
    """Return the sampler of a data set."""
    return CausalSampler(context)


class CausalSampler:
    """Rows of text with each token's successor as its target."""

    def __init__(self, context: SamplerContext) -> None:
        self.context = context
        # ends of text pad, also where padding has a token of its own: what was trained before it had is trained alike
        self.eos_id = context.dataset.index.eos_id
        self.packing: Packing = (
            BestFit(context.dataset, context.length, lookahead=True)
            if context.packing == "best_fit"
            else Concatenation(context.dataset, context.length, "successors")
        )
        self.count = self.packing.count

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        """Return the rows: targets have weight 1, padding and forgotten documents 0, and so has a target in the next
        document if documents do not see each other."""
        inside_documents = self.context.attention == "document"
        read = self.read(samples_B3, shard_rows, num_rows)
        buffer = RowBuffer(read.tokens_BT, read.totals_B)
        buffer.begin(read.start_rows, read.starts)
        weights_BT, targets_B = np.ones(read.tokens_BT.shape, np.float32), read.totals_B
        for row in np.flatnonzero(targets_B < self.context.length):
            weights_BT[row, targets_B[row] :] = 0.0
        inputs = {"tokens_BT": read.tokens_BT, "targets_BT": read.targets_BT, "weights_BT": weights_BT}
        if inside_documents:
            weights_BT[read.end_rows, read.ends] = 0.0
            targets_B = targets_B - np.bincount(read.end_rows, minlength=num_rows)
            inputs["segments_BT"] = buffer.documents_BT
        if read.forgotten_BT is not None:
            weights_BT[read.forgotten_BT] = 0.0
            targets_B = np.count_nonzero(weights_BT, axis=1)
        return SampledRows(inputs, {"causal": targets_B}, buffer.documents_BT)

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        del epoch  # rows are the same in each
        return self.packing.rows_of(number, documents)

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        return self.packing.ranges(shard_rows)

    def read(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> _Read:
        """Read the rows of samples, all at once where the packing can."""
        if isinstance(self.packing, Concatenation) and len(shard_rows):
            return self._read_together(self.packing, shard_rows, num_rows)
        return self.laid_out([self.row(shard_row) for shard_row in shard_rows.tolist()], num_rows)

    def row(self, shard_row: list[int]) -> Row:
        """Return the row at (shard, row)."""
        number, row = shard_row
        return self.packing.row(self.context.shard(number), number, row)

    def laid_out(self, rows: list[Row], num_rows: int) -> _Read:
        """Return rows one below the other, filled up with ends of text and padding rows."""
        shape = (num_rows, self.context.length)
        tokens_BT, targets_BT = np.full(shape, self.eos_id, np.int64), np.full(shape, self.eos_id, np.int64)
        totals_B, forgotten_BT = np.zeros(num_rows, np.int64), np.zeros(shape, bool)
        for b, row in enumerate(rows):
            assert row.successors is not None
            totals_B[b] = row.tokens.size
            if row.forgotten is not None:
                forgotten_BT[b, : row.tokens.size] = row.forgotten
            tokens_BT[b, : row.tokens.size], targets_BT[b, : row.tokens.size] = row.tokens, row.successors
        starts, ends = [row.starts for row in rows], [row.ends for row in rows]
        forgotten_BT = forgotten_BT if forgotten_BT.any() else None
        return _Read(tokens_BT, targets_BT, totals_B, *_numbered(starts), *_numbered(ends), forgotten_BT)

    def _read_together(self, packing: Concatenation, shard_rows: np.ndarray, num_rows: int) -> _Read:
        """Read rows of W = T + 1 tokens at once; tokens and targets are views of them where no row is short."""
        count = len(shard_rows)
        whole_BW = np.empty((num_rows, self.context.length + 1), np.int64)
        read = packing.stretches(self.context.shard, shard_rows, whole_BW[:count])
        totals_B = np.zeros(num_rows, np.int64)
        totals_B[:count] = read.sizes_N - 1
        tokens_BT, targets_BT = whole_BW[:, :-1], whole_BW[:, 1:]
        short = np.flatnonzero(totals_B < self.context.length)
        if short.size:  # a view would let the padding of the tokens overwrite targets
            tokens_BT, targets_BT = tokens_BT.copy(), targets_BT.copy()
        for row in short:
            behind = slice(totals_B[row], None)
            tokens_BT[row, behind] = targets_BT[row, behind] = self.eos_id
        # a document that begins with the last successor begins outside of the row, but ends what the row predicts
        inside = read.positions < totals_B[read.rows]
        starts, ends = (read.rows[inside], read.positions[inside]), (read.rows, read.positions - 1)
        forgotten_BT = None
        if read.forgotten_NW is not None:
            forgotten_BT = np.zeros(targets_BT.shape, bool)
            forgotten_BT[:count] = read.forgotten_NW[:, 1:]  # (N, T + 1) tokens -> (N, T) targets
        return _Read(tokens_BT, targets_BT, totals_B, *starts, *ends, forgotten_BT)


def _numbered(positions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, positions) of a list of positions per row: [[1, 4], [], [2]] is ([0, 0, 2], [1, 4, 2])."""
    rows = np.repeat(np.arange(len(positions)), [found.size for found in positions])
    return rows, np.concatenate([np.empty(0, np.int64), *positions])
