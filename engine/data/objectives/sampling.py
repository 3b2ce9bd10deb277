"""From a run stage's objective to the rows of a micro-batch: packing and objective put together.

A sampler counts the samples of shards, and makes the model's inputs of those it is asked for. Invariant: a sample's
inputs are a function of (data set, objective, sequence length, seed, address); no rank, batch or restart enters.

B batch (rows), T time, M most masked tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from engine.config.lengths import span_lengths
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives import fill_in_the_middle, masking, span_corruption
from engine.data.objectives.best_fit import BestFit
from engine.data.objectives.causal import causal
from engine.data.objectives.draws import PURPOSE_OBJECTIVE, halves, words
from engine.data.objectives.packing import Concatenation, Packing, Row
from engine.data.objectives.pairs import Pairs
from engine.data.objectives.requirements import require
from engine.data.shards.dataset import Shard, TokenDataset
from engine.data.tokenizer.vocabulary import Vocabulary

Attention = Literal["document", "row"]
PackingName = Literal["concatenate", "best_fit"]


@dataclass(frozen=True)
class Made:
    """Inputs by the model's keywords, the weight of each row by loss (B,), and what each row is made of."""

    inputs: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    documents: np.ndarray
    """int32 number of the document of each place within its row, padding last."""


class Sampler(Protocol):
    """What one objective makes of a data set."""

    def count(self, shards: np.ndarray) -> np.ndarray:
        """(n,) int64 samples in each of the shards (n,). Raises `DataError` where offsets are damaged."""
        ...

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> Made:
        """The rows of the samples (shard, row) at `places`, filled up to `num_rows` with rows of weight 0.

        Raises `DataError` where a shard is damaged.
        """
        ...


def make_sampler(
    dataset: TokenDataset,
    sequence_length: int,
    seed: int,
    attention: Attention,
    packing: PackingName = "concatenate",
    objective: ObjectiveConfig | None = None,
) -> Sampler:
    """The sampler of an objective. Raises `DataError` where the shards lack what it needs."""
    objective = objective or ObjectiveConfig()
    require(dataset, sequence_length, objective)
    context = _Context(dataset, sequence_length, seed, attention, objective)
    if objective.name == "masked":
        return _PairSampler(context) if objective.pairs != "none" else _MaskedSampler(context, packing)
    if objective.name == "span_corruption":
        return _SpanSampler(context)
    return _CausalSampler(context, packing)


@dataclass(frozen=True)
class _Context:
    dataset: TokenDataset
    length: int
    seed: int
    attention: Attention
    objective: ObjectiveConfig

    @property
    def vocabulary(self) -> Vocabulary:
        assert self.dataset.index.vocabulary is not None, "require() lets nothing else pass"
        return self.dataset.index.vocabulary

    @property
    def padding_id(self) -> int:
        index = self.dataset.index
        found = index.vocabulary.padding if index.vocabulary is not None else None
        return index.eos_id if found is None else found

    def shard(self, number: int) -> Shard:
        return self.dataset.shard(number)

    def words(self, samples_B3: np.ndarray, num_rows: int, num_words: int) -> np.ndarray:
        """(num_rows, num_words) random words of the samples; 0 in rows that stand for nothing."""
        drawn = np.zeros((num_rows, num_words), np.uint64)
        drawn[: len(samples_B3)] = words(self.seed, PURPOSE_OBJECTIVE, samples_B3, num_words)
        return drawn


@dataclass(frozen=True)
class _Sheet:
    """Rows to write on: tokens, how many are real, and where documents begin."""

    tokens_BT: np.ndarray
    totals_B: np.ndarray
    _begins: list[np.ndarray] = field(default_factory=list)
    """Places from the beginning of the first row on."""

    def begin(self, rows: np.ndarray | int, places: np.ndarray) -> None:
        """Notes where documents begin; all of them before they are asked for."""
        self._begins.append(rows * self.tokens_BT.shape[1] + places)

    @cached_property
    def real_BT(self) -> np.ndarray:
        return np.arange(self.tokens_BT.shape[1]) < self.totals_B[:, None]

    @property
    def starts_BT(self) -> np.ndarray:
        """bool: where documents begin."""
        starts = np.zeros(self.tokens_BT.size, bool)
        for begins in self._begins:
            starts[begins] = True
        return starts.reshape(self.tokens_BT.shape)

    @cached_property
    def documents_BT(self) -> np.ndarray:
        """int32: number of the document within its row, from 0; padding is the last."""
        num_rows, length = self.tokens_BT.shape
        firsts_B = np.arange(0, num_rows * length, length)
        padded = np.flatnonzero((self.totals_B > 0) & (self.totals_B < length))
        edges = np.unique(np.concatenate([firsts_B, *self._begins, (firsts_B + self.totals_B)[padded]]))
        numbers = np.arange(edges.size) - edges.searchsorted(firsts_B)[edges // length]
        lengths = np.append(edges[1:], num_rows * length) - edges
        return numbers.astype(np.int32).repeat(lengths).reshape(num_rows, length)

    def padding_BT(self) -> np.ndarray:
        """int32: 0, and 1 in the padding of rows that are not all padding."""
        return (~self.real_BT & (self.totals_B > 0)[:, None]).astype(np.int32)


def _sheet(num_rows: int, length: int, padding_id: int) -> _Sheet:
    return _Sheet(np.full((num_rows, length), padding_id, np.int64), np.zeros(num_rows, np.int64))


class _CausalSampler:
    """Causal rows, with documents rearranged or not."""

    def __init__(self, context: _Context, packing: PackingName) -> None:
        self._context = context
        self._packing: Packing = (
            BestFit(context.dataset, context.length, lookahead=True)
            if packing == "best_fit"
            else Concatenation(context.dataset, context.length, "successors")
        )
        self.count = self._packing.count

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> Made:
        context, packing = self._context, self._packing
        if isinstance(packing, Concatenation) and context.objective.name == "causal" and len(places):
            return self._make_together(packing, places, num_rows)
        # ends of text pad: what was trained before padding had a token of its own is trained the same today
        sheet = _sheet(num_rows, context.length, context.dataset.index.eos_id)
        rows = self._rows(samples_B3, places)
        for b, row in enumerate(rows):
            sheet.tokens_BT[b, : row.tokens.size] = row.tokens
            sheet.begin(b, row.starts)
            sheet.totals_B[b] = row.tokens.size
        targets_BT = np.full(sheet.tokens_BT.shape, context.dataset.index.eos_id, np.int64)
        weights_BT = np.zeros(sheet.tokens_BT.shape, np.float32)
        causal(rows, targets_BT, weights_BT, context.attention == "document")
        inputs = {"tokens_BT": sheet.tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
        documents_BT = sheet.documents_BT
        if context.attention == "document":
            inputs["segments_BT"] = documents_BT
        return Made(inputs, {"causal": weights_BT.sum(axis=1)}, documents_BT)

    def _make_together(self, packing: Concatenation, places: np.ndarray, num_rows: int) -> Made:
        """What `make` makes, of all rows at once; targets are a view of the same tokens, where no row is short."""
        context, eos_id, count = self._context, self._context.dataset.index.eos_id, len(places)
        whole_BW = np.empty((num_rows, context.length + 1), np.int64)
        read = packing.stretches(context.shard, places, whole_BW[:count])
        totals_B = np.zeros(num_rows, np.int64)
        totals_B[:count] = read.sizes_N - 1
        tokens_BT, targets_BT = whole_BW[:, :-1], whole_BW[:, 1:]
        weights_BT, targets_B = np.ones(tokens_BT.shape, np.float32), totals_B
        short = np.flatnonzero(totals_B < context.length)
        if short.size:
            tokens_BT, targets_BT = tokens_BT.copy(), targets_BT.copy()
        for row in short:
            behind = slice(totals_B[row], None)
            tokens_BT[row, behind] = targets_BT[row, behind] = eos_id
            weights_BT[row, behind] = 0.0
        inputs = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
        sheet = _Sheet(tokens_BT, totals_B)
        inside = read.places < totals_B[read.rows]
        sheet.begin(read.rows[inside], read.places[inside])
        if context.attention == "document":
            weights_BT.put(read.rows * context.length + read.places - 1, 0.0)
            targets_B = totals_B - np.bincount(read.rows, minlength=num_rows)
            inputs["segments_BT"] = sheet.documents_BT
        return Made(inputs, {"causal": targets_B}, sheet.documents_BT)

    def _rows(self, samples_B3: np.ndarray, places: np.ndarray) -> list[Row]:
        context = self._context
        rows = [self._packing.row(context.shard(number), number, row) for number, row in places.tolist()]
        if context.objective.name != "fill_in_the_middle" or not rows:
            return rows
        drawn = context.words(samples_B3, len(rows), fill_in_the_middle.num_words(context.length))
        eos_id, vocabulary = context.dataset.index.eos_id, context.vocabulary
        return [
            fill_in_the_middle.rearrange(row, context.length, context.objective, vocabulary, eos_id, drawn[b])
            for b, row in enumerate(rows)
        ]


class _MaskedSampler:
    """Masked tokens without pairs. A stretch stands between [CLS] and [SEP], a whole document behind [CLS], where the
    tokenizer has them."""

    def __init__(self, context: _Context, packing: PackingName) -> None:
        self._context, vocabulary = context, context.vocabulary
        self._whole = packing == "best_fit"
        self._head = [] if vocabulary.classify is None else [vocabulary.classify]
        self._tail = [] if self._whole or not self._head or vocabulary.separate is None else [vocabulary.separate]
        self._packing: Packing = (
            BestFit(context.dataset, context.length, lookahead=False, extra=len(self._head))
            if self._whole
            else Concatenation(context.dataset, context.length - len(self._head) - len(self._tail), "all")
        )
        self.count = self._packing.count

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> Made:
        sheet = _sheet(num_rows, self._context.length, self._context.padding_id)
        if isinstance(self._packing, Concatenation):
            self._write_together(sheet, self._packing, places)
            places = places[:0]
        for b, (number, row_number) in enumerate(places.tolist()):
            row = self._packing.row(self._context.shard(number), number, row_number)
            tokens, starts = self._framed(row)
            sheet.tokens_BT[b, : tokens.size] = tokens
            sheet.begin(b, starts)
            sheet.totals_B[b] = tokens.size
        inputs, weights = _masked(self._context, sheet, samples_B3)
        return Made(inputs, weights, sheet.documents_BT)

    def _write_together(self, sheet: _Sheet, packing: Concatenation, places: np.ndarray) -> None:
        """Writes all rows at once, each within its frame."""
        if not len(places):
            return
        head, rows, count = len(self._head), np.arange(len(places)), len(places)
        body_NT = sheet.tokens_BT[:count, head : head + packing.capacity]
        read = packing.stretches(self._context.shard, places, body_NT)
        sheet.tokens_BT[:count, :head] = self._head
        for offset, token in enumerate(self._tail):
            sheet.tokens_BT[rows, head + read.sizes_N + offset] = token
        sheet.totals_B[:count] = head + read.sizes_N + len(self._tail)
        sheet.begin(read.rows, read.places + head)

    def _framed(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of whole documents, each behind its head, and where they begin."""
        tokens = (
            np.insert(row.tokens.astype(np.int64), np.append(0, row.starts), self._head) if self._head else row.tokens
        )
        return tokens, row.starts + len(self._head) * np.arange(1, row.starts.size + 1)


class _PairSampler:
    """Masked tokens and pairs: [CLS] first [SEP] second [SEP], or [CLS] first [SEP]."""

    def __init__(self, context: _Context) -> None:
        assert context.objective.pairs != "none"
        self._context = context
        self._pairs = Pairs(context.dataset, context.length - 3, context.objective.pairs, context.seed)
        self.count = self._pairs.count

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> Made:
        context, vocabulary = self._context, self._context.vocabulary
        sheet = _sheet(num_rows, context.length, context.padding_id)
        types_BT = np.zeros(sheet.tokens_BT.shape, np.int64)
        labels_B, weights_B = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
        for b, (number, row) in enumerate(places.tolist()):
            shard = context.shard(number)
            segments, labels_B[b], weights_B[b] = self._pairs.pair(number, row, int(samples_B3[b, 0]))
            at = 1
            sheet.tokens_BT[b, 0] = vocabulary.classify
            for order, (start, end) in enumerate(segments):
                stop = at + end - start
                sheet.tokens_BT[b, at:stop] = shard.tokens[start:end]
                sheet.tokens_BT[b, stop] = vocabulary.separate
                types_BT[b, at : stop + 1] = order
                at = stop + 1
            sheet.totals_B[b] = at
        inputs, weights = _masked(context, sheet, samples_B3)
        inputs |= {"token_types_BT": types_BT, "pair_targets_B": labels_B, "pair_weights_B": weights_B}
        weights["pairs"] = weights_B
        return Made(inputs, weights, sheet.documents_BT)


def _masked(
    context: _Context, sheet: _Sheet, samples_B3: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and weights of the masked rows; masks what stands on the sheet."""
    length, objective = context.length, context.objective
    drawn = context.words(samples_B3, len(sheet.totals_B), masking.num_words(length, objective.rate))
    made = masking.mask(sheet.tokens_BT, sheet.real_BT, sheet.starts_BT, objective, context.vocabulary, drawn)
    segments_BT = sheet.documents_BT if context.attention == "document" else sheet.padding_BT()
    inputs = {"tokens_BT": sheet.tokens_BT, "segments_BT": segments_BT, **made._asdict()}
    return inputs, {"mlm": made.weights_BM.sum(axis=1)}


class _SpanSampler:
    """T5's rows: consecutive text, as much as fills the encoder once spans are sentinels."""

    def __init__(self, context: _Context) -> None:
        self._context, objective = context, context.objective
        self._lengths = span_lengths(context.length, objective.rate, objective.mean_span_length)
        self._packing = Concatenation(context.dataset, self._lengths.read, "text")
        self.count = self._packing.count

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> Made:
        context, objective, read = self._context, self._context.objective, self._lengths.read
        sheet = _sheet(num_rows, read, context.padding_id)
        for b, (number, row_number) in enumerate(places.tolist()):
            row = self._packing.row(context.shard(number), number, row_number)
            sheet.tokens_BT[b, : row.tokens.size] = row.tokens
            sheet.begin(b, row.starts)
            sheet.totals_B[b] = row.tokens.size
        drawn = halves(context.words(samples_B3, num_rows, span_corruption.num_words(self._lengths)))[:, :read]
        documents = sheet.documents_BT if context.attention == "document" else np.zeros((num_rows, read), np.int32)
        made = span_corruption.corrupt(
            sheet.tokens_BT,
            sheet.totals_B,
            documents,
            drawn,
            objective.rate,
            objective.mean_span_length,
            self._lengths,
            context.vocabulary.sentinels,
            context.dataset.index.eos_id,
            context.padding_id,
        )
        return Made(made._asdict(), {"span": made.weights_BT.sum(axis=1)}, made.segments_BS)
