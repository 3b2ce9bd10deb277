"""The masked objective: some tokens are hidden from the model and predicted, and, with pairs, how segments belong.

What is masked is chosen in `engine.data.objectives.masking`, pairs in `engine.data.objectives.pairs`.

B batch (rows), T sequence length, N rows that are read at once.
"""

from __future__ import annotations

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives import masking
from engine.data.objectives.best_fit import BestFit
from engine.data.objectives.packing import Concatenation, Packing, Row
from engine.data.objectives.pairs import Pairs
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import Sampler, SamplerContext
from engine.data.tokenizer.vocabulary import Vocabulary


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> str | None:
    """Return the special tokens that a tokenizer lacks, in words; None where it has all."""
    del sequence_length
    if vocabulary.mask is None:
        return "mask token"
    framed = vocabulary.classify is not None and vocabulary.separate is not None
    return None if framed or objective.pairs == "none" else "tokens for [CLS] and [SEP]"


def make_sampler(context: SamplerContext) -> Sampler:
    """Return the sampler of a data set."""
    return _PairSampler(context) if context.objective.pairs != "none" else _MaskedSampler(context)


class _MaskedSampler:
    """Masked tokens without pairs. Rows of text stand between [CLS] and [SEP], whole documents after [CLS], where the
    tokenizer has them."""

    def __init__(self, context: SamplerContext) -> None:
        self._context, vocabulary = context, context.vocabulary
        self._whole = context.packing == "best_fit"
        self._head = [] if vocabulary.classify is None else [vocabulary.classify]
        # whole documents end with their own end of text, rows of concatenated text with [SEP]
        self._tail = [] if self._whole or not self._head or vocabulary.separate is None else [vocabulary.separate]
        self._packing: Packing = (
            BestFit(context.dataset, context.length, lookahead=False, extra=len(self._head))
            if self._whole
            else Concatenation(context.dataset, context.length - len(self._head) - len(self._tail), "all")
        )
        self.count = self._packing.count

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        buffer = RowBuffer.empty(num_rows, self._context.length, self._context.padding_id)
        if isinstance(self._packing, Concatenation):
            self._write_together(buffer, self._packing, shard_rows)
            # all rows are written: the loop below has nothing left to do
            shard_rows = shard_rows[:0]
        for b, (number, row_number) in enumerate(shard_rows.tolist()):
            row = self._packing.row(self._context.shard(number), number, row_number)
            buffer.write(b, *self._framed(row))
            if row.forgotten is not None:
                buffer.forget(b, np.flatnonzero(self._behind_heads(row.forgotten, row.starts)))
        inputs, weights = _masked(self._context, buffer, samples_B3)
        return SampledRows(inputs, weights, buffer.documents_BT)

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        del epoch  # rows are the same in each
        return self._packing.rows_of(number, documents)

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        return self._packing.ranges(shard_rows)

    def _write_together(self, buffer: RowBuffer, packing: Concatenation, shard_rows: np.ndarray) -> None:
        """Write all rows at once, each between its head and its tail."""
        if not len(shard_rows):
            return
        head, rows, count = len(self._head), np.arange(len(shard_rows)), len(shard_rows)
        # (N, capacity) view of the buffer: tokens are copied once, to where the model reads them
        body_NT = buffer.tokens_BT[:count, head : head + packing.capacity]
        read = packing.stretches(self._context.shard, shard_rows, body_NT)
        buffer.tokens_BT[:count, :head] = self._head
        for offset, token in enumerate(self._tail):
            # behind the row's last token, which in a shard's last row is before the end of the row
            buffer.tokens_BT[rows, head + read.sizes_N + offset] = token
        buffer.totals_B[:count] = head + read.sizes_N + len(self._tail)
        buffer.begin(read.rows, read.positions + head)
        if read.forgotten_NW is not None:
            forgotten_rows, places_in_row = np.nonzero(read.forgotten_NW)
            buffer.forget(forgotten_rows, places_in_row + head)

    def _framed(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of whole documents, each behind its head, and where they begin: with the head 9, documents
        [1, 2] and [3] are [9, 1, 2, 9, 3], and the second begins at 3."""
        tokens = (
            np.insert(row.tokens.astype(np.int64), np.append(0, row.starts), self._head) if self._head else row.tokens
        )
        return tokens, row.starts + len(self._head) * np.arange(1, row.starts.size + 1)

    def _behind_heads(self, forgotten: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the flags of a row's tokens with those of the heads, which are False, between them."""
        return np.insert(forgotten, np.append(0, starts), False) if self._head else forgotten


class _PairSampler:
    """Masked tokens and pairs: [CLS] first [SEP] second [SEP], or [CLS] first [SEP]."""

    def __init__(self, context: SamplerContext) -> None:
        assert context.objective.pairs != "none"
        self._context = context
        # 3: [CLS] and two [SEP]
        self._pairs = Pairs(context.dataset, context.length - 3, context.objective.pairs, context.seed)
        self.count = self._pairs.count

    def ranges(self, samples_B3: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
        epochs = samples_B3[:, 0].tolist()
        pairs = [
            [(number, *bounds) for bounds in self._pairs.pair(number, row, epoch)[0]]
            for (number, row), epoch in zip(shard_rows.tolist(), epochs, strict=True)
        ]
        return np.array([segment for pair in pairs for segment in pair], np.int64).reshape(-1, 3)

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        context, vocabulary = self._context, self._context.vocabulary
        buffer = RowBuffer.empty(num_rows, context.length, context.padding_id)
        types_BT = np.zeros(buffer.tokens_BT.shape, np.int64)
        labels_B, weights_B = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
        for b, (number, row) in enumerate(shard_rows.tolist()):
            shard = context.shard(number)
            segments, labels_B[b], weights_B[b] = self._pairs.pair(number, row, int(samples_B3[b, 0]))
            at = 1
            buffer.tokens_BT[b, 0] = vocabulary.classify
            for order, (start, end) in enumerate(segments):
                stop = at + end - start
                buffer.tokens_BT[b, at:stop] = shard.tokens[start:end]
                if shard.is_forgotten(start):  # a segment lies in one document
                    buffer.forget(b, np.arange(at, stop))
                    weights_B[b] = 0.0  # a label about a text that is not there
                buffer.tokens_BT[b, stop] = vocabulary.separate
                # a segment's [SEP] has its type, as in BERT; [CLS] has that of the first
                types_BT[b, at : stop + 1] = order
                at = stop + 1
            buffer.totals_B[b] = at
        inputs, weights = _masked(context, buffer, samples_B3)
        inputs |= {"token_types_BT": types_BT, "pair_targets_B": labels_B, "pair_weights_B": weights_B}
        weights["pairs"] = weights_B
        return SampledRows(inputs, weights, buffer.documents_BT)

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        return self._pairs.rows_of(number, documents, epoch)


def _masked(
    context: SamplerContext, buffer: RowBuffer, samples_B3: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Mask tokens in the buffer and return the inputs and weights of its rows."""
    length, objective = context.length, context.objective
    # words of the samples, not of the batch: a row is masked alike in every micro-batch and layout
    drawn = context.words(samples_B3, len(buffer.totals_B), masking.num_words(length, objective.rate))
    made = masking.mask(buffer.tokens_BT, buffer.target_BT, buffer.starts_BT, objective, context.vocabulary, drawn)
    inputs = {"tokens_BT": buffer.tokens_BT, "segments_BT": context.segments(buffer), **made._asdict()}
    return inputs, {"mlm": made.weights_BM.sum(axis=1)}
