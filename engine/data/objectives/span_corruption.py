"""Span corruption: spans of the text become sentinels, and the decoder spells them out.

Raffel et al. 2020, section 3.1.4. The encoder sees what is kept, each span replaced by a sentinel, and the end of the
text; the decoder's targets are each sentinel followed by its span, and the end of the text. Its inputs are the
targets shifted by one behind a padding token. Departure: where documents must not see each other, sentinels begin
anew and the shift starts anew with each document, a span across a boundary counts for the document it begins in, and
what it holds of the next one is no target.

B batch (rows), R tokens read, S encoder length, T decoder length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.config.objectives import SpanLengths, noise, span_lengths
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.draws import halves
from engine.data.objectives.packing import Concatenation
from engine.data.objectives.rows import RowBuffer, SampledRows
from engine.data.objectives.sampling import SamplerContext
from engine.data.objectives.spans import noise_mask
from engine.data.tokenizer.vocabulary import Vocabulary


class Corrupted(NamedTuple):
    """int64 tokens, int32 segments, float32 weights; the encoder's padding is a segment of its own."""

    tokens_BS: np.ndarray
    segments_BS: np.ndarray
    decoder_tokens_BT: np.ndarray
    decoder_segments_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> str | None:
    """Return the special tokens that a tokenizer lacks, in words; None where it has all."""
    lengths = span_lengths(sequence_length, objective.rate, objective.mean_span_length)
    _, spans = noise(lengths.read, objective.rate, objective.mean_span_length)
    return None if spans <= len(vocabulary.sentinels) else f"{spans} sentinels (it has {len(vocabulary.sentinels)})"


def make_sampler(context: SamplerContext) -> _Sampler:
    """Return the sampler of a data set."""
    return _Sampler(context)


class _Sampler:
    """T5's rows: consecutive text, as much as fills the encoder once spans are sentinels."""

    def __init__(self, context: SamplerContext) -> None:
        self._context, objective = context, context.objective
        self._lengths = span_lengths(context.length, objective.rate, objective.mean_span_length)
        self._packing = Concatenation(context.dataset, self._lengths.read, "text")
        self.count = self._packing.count

    def ranges(self, samples_B3: np.ndarray, places: np.ndarray) -> np.ndarray:
        return self._packing.ranges(places)

    def make(self, samples_B3: np.ndarray, places: np.ndarray, num_rows: int) -> SampledRows:
        context, objective, read = self._context, self._context.objective, self._lengths.read
        buffer = RowBuffer.empty(num_rows, read, context.padding_id)
        for b, (number, row_number) in enumerate(places.tolist()):
            row = self._packing.row(context.shard(number), number, row_number)
            buffer.write(b, row.tokens, row.starts)
            if row.forgotten is not None:
                buffer.forget(b, np.flatnonzero(row.forgotten))
        drawn = halves(context.words(samples_B3, num_rows, num_words(self._lengths)))[:, :read]
        documents = buffer.documents_BT if context.attention == "document" else np.zeros((num_rows, read), np.int32)
        made = corrupt(
            buffer.tokens_BT,
            buffer.totals_B,
            documents,
            drawn,
            objective.rate,
            objective.mean_span_length,
            self._lengths,
            context.vocabulary.sentinels,
            context.dataset.index.eos_id,
            context.padding_id,
            buffer.forgotten_BT,
        )
        return SampledRows(made._asdict(), {"span": made.weights_BT.sum(axis=1)}, made.segments_BS)

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        del epoch  # rows are the same in each
        return self._packing.rows_of(number, documents)


def num_words(lengths: SpanLengths) -> int:
    """Return the number of random words that a row needs: half a word for each token read."""
    return -(-lengths.read // 2)


def corrupt(
    tokens_BR: np.ndarray,
    totals_B: np.ndarray,
    documents_BR: np.ndarray,
    keys_BR: np.ndarray,
    rate: float,
    mean_span_length: float,
    lengths: SpanLengths,
    sentinels: tuple[int, ...],
    eos_id: int,
    padding_id: int,
    forgotten_BR: np.ndarray | None = None,
) -> Corrupted:
    """Return the rows corrupted; row b reads the first `totals_B` of its tokens (int64), a padding row none.

    `documents_BR` numbers the document of each token within its row, from 0: all 0 where documents see each other.
    Tokens of forgotten documents (`forgotten_BR`; None: there are none) are no targets, nor are the sentinels of spans
    that begin there, nor the end of the text behind such a document.
    """
    forgotten_BR = np.zeros(tokens_BR.shape, bool) if forgotten_BR is None else forgotten_BR
    noise_B, spans_B = _amounts(totals_B, rate, mean_span_length)
    noise_BR = noise_mask(keys_BR, totals_B, noise_B, spans_B)
    real_BR = np.arange(tokens_BR.shape[1]) < totals_B[:, None]
    before_BR = np.pad(noise_BR[:, :-1], ((0, 0), (1, 0)))  # noise at the token before
    heads_BR = noise_BR & ~before_BR
    owners_BR, marks_BR = _owners(heads_BR, noise_BR, documents_BR, np.array(sentinels, np.int64))
    # document of each row's last token; a padding row has 0
    last_B = np.where(totals_B > 0, np.take_along_axis(documents_BR, np.maximum(totals_B - 1, 0)[:, None], 1)[:, 0], 0)
    # the encoder: what is kept, and a sentinel at each head
    seen_BR = np.where(heads_BR, marks_BR, tokens_BR)
    at_BR = (~noise_BR & real_BR) | heads_BR
    own_padding_B = last_B + (totals_B > 0)
    tokens_BS, segments_BS = _rows(
        lengths.encoder, at_BR, seen_BR, documents_BR, totals_B, last_B, own_padding_B, eos_id, padding_id
    )
    # the decoder: a sentinel before each head, then the noise; (B, R) -> (B, 2 R), for each token a sentinel's position
    # and its own
    pairs = np.stack((marks_BR, tokens_BR), axis=-1).reshape(len(tokens_BR), -1)
    used = np.stack((heads_BR, noise_BR), axis=-1).reshape(pairs.shape)
    owners = np.repeat(owners_BR, 2, axis=1)
    own = np.stack((heads_BR, noise_BR & (owners_BR == documents_BR)), axis=-1) & ~forgotten_BR[..., None]
    own = own.reshape(pairs.shape)
    # (B,): weight of the end of the text, which the row's last token is followed by
    lasts_B = np.maximum(totals_B - 1, 0)
    ends_B = (~np.take_along_axis(forgotten_BR, lasts_B[:, None], axis=1)[:, 0]).astype(np.int64)
    # nothing before it sees the decoder's padding, and so it sees the encoder's last document: never nothing at all
    rest = (totals_B, last_B, last_B)
    targets_BT, decoder_segments_BT = _rows(lengths.decoder, used, pairs, owners, *rest, eos_id, padding_id)
    weights_BT, _ = _rows(lengths.decoder, used, own, owners, *rest, ends_B, 0)
    # shifted right, and padding at the first position of each document: no target of another document is seen
    decoder_tokens_BT = np.pad(targets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=padding_id)
    anew = np.pad(np.diff(decoder_segments_BT, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)
    decoder_tokens_BT[anew] = padding_id
    return Corrupted(
        tokens_BS, segments_BS, decoder_tokens_BT, decoder_segments_BT, targets_BT, weights_BT.astype(np.float32)
    )


def _amounts(totals_B: np.ndarray, rate: float, mean_span_length: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the spans of noise of each row, (B,) int64 each."""
    found = [noise(total, rate, mean_span_length) if total else (0, 0) for total in totals_B.tolist()]
    amounts = np.array(found, np.int64).reshape(-1, 2)
    return amounts[:, 0], amounts[:, 1]


def _owners(
    heads_BR: np.ndarray, noise_BR: np.ndarray, documents_BR: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the document in which the span at each token begins, and its sentinel, counted from 0 in each document."""
    places_R = np.arange(heads_BR.shape[1])
    head_BR = np.maximum.accumulate(np.where(heads_BR, places_R, 0), axis=1)
    owners_BR = np.take_along_axis(documents_BR, head_BR, axis=1)
    heads_so_far = np.cumsum(heads_BR, axis=1)
    begins = np.pad(np.diff(documents_BR, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)
    first_BR = np.maximum.accumulate(np.where(begins, places_R, 0), axis=1)  # first token of the token's document
    before = np.take_along_axis(heads_so_far - heads_BR, first_BR, axis=1)
    number_BR = np.where(heads_BR, heads_so_far - 1 - before, 0)
    return np.where(noise_BR, owners_BR, documents_BR), sentinels[number_BR]


def _rows(
    length: int,
    used: np.ndarray,
    values: np.ndarray,
    documents: np.ndarray,
    totals_B: np.ndarray,
    last_B: np.ndarray,
    padding_segment_B: np.ndarray,
    end: np.ndarray | int,
    padding: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the used values of each row moved to its front, then `end` (for all, or (B,)), then padding; and the
    segments of these."""
    rows, places = np.nonzero(used)
    at = np.arange(rows.size) - np.searchsorted(rows, rows)  # rows [0, 0, 2] are filled at [0, 1, 0]
    counts_B = np.bincount(rows, minlength=len(used))
    moved = np.full((len(used), length), padding, np.int64)
    moved[rows, at] = values[rows, places]
    segments = np.repeat(padding_segment_B[:, None], length, axis=1).astype(np.int32)
    segments[rows, at] = documents[rows, places]
    whole = np.flatnonzero(totals_B > 0)
    moved[whole, counts_B[whole]] = np.broadcast_to(end, len(used))[whole]
    segments[whole, counts_B[whole]] = last_B[whole]
    return moved, segments
