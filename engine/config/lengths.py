"""Lengths that follow from a stage's objective and sequence length: what a row reads, masks and predicts. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.stage import RunStage


class RowLengths(NamedTuple):
    """Tokens of a row of a run stage, in its several parts."""

    tokens: int
    """That the model (where there is a decoder, the encoder) sees."""
    predicted: int
    """That the head computes the loss of."""
    decoder: int = 0
    """That the decoder sees; 0 where there is none."""

    def shared_by(self, ranks: int) -> RowLengths:
        """Of one of some ranks that share the time of a row."""
        return RowLengths(*(length // ranks for length in self))

    def filled(self, ranks: int) -> RowLengths:
        """With the decoder's rows made as long as `ranks` can share them: theirs is the length that nobody chose."""
        if self.decoder == 0:
            return self
        decoder = -(-self.decoder // ranks) * ranks
        return self._replace(predicted=decoder, decoder=decoder)


class SpanLengths(NamedTuple):
    """Of a row of span corruption: tokens read, and the lengths that encoder and decoder are filled to."""

    read: int
    encoder: int
    decoder: int


def num_masked(num_tokens: int, rate: float) -> int:
    """Tokens of a row that are masked: the share rounded, one at least (Devlin et al. 2019, reference code)."""
    return max(1, round(num_tokens * rate))


def noise(num_tokens: int, rate: float, mean_span_length: float) -> tuple[int, int]:
    """(tokens, spans) of noise among 2 tokens or more; outside of spans there is as many as spans, or more.

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning", reference code (`random_spans_noise_mask`), but
    that there are never more spans than tokens between them.
    """
    tokens = min(max(round(num_tokens * rate), 1), num_tokens - 1)
    spans = max(round(tokens / mean_span_length), 1)
    return tokens, min(spans, num_tokens - tokens)


def span_lengths(sequence_length: int, rate: float, mean_span_length: float) -> SpanLengths:
    """The most tokens that fit an encoder of `sequence_length` (3 or more) once their spans are sentinels.

    Sentinels and the end of the text count. One token more adds one or none, so the encoder is always filled
    (`compute_input_and_target_lengths` of the same reference code).
    """
    beyond = 3
    while _corrupted(beyond, rate, mean_span_length)[0] <= sequence_length:
        beyond *= 2
    too_long: Callable[[int], bool] = lambda read: _corrupted(read, rate, mean_span_length)[0] > sequence_length  # noqa: E731
    read = bisect_left(range(beyond + 1), True, lo=3, key=too_long) - 1
    return SpanLengths(read, *_corrupted(read, rate, mean_span_length))


def row_lengths(stage: RunStage) -> RowLengths:
    """The lengths of a stage's rows."""
    length, objective = stage.sequence_length, stage.objective
    if objective.name == "masked":
        return RowLengths(length, num_masked(length, objective.rate))
    if objective.name == "span_corruption":
        decoder = span_lengths(length, objective.rate, objective.mean_span_length).decoder
        return RowLengths(length, decoder, decoder)
    return RowLengths(length, length)


def held_lengths(stage: RunStage, parallel: ParallelConfig) -> RowLengths:
    """The lengths of a stage's rows as a layout holds them: a decoder's filled up to a multiple of `time_ranks`."""
    return row_lengths(stage).filled(parallel.time_ranks)


def has_segments(attention: str, objective: ObjectiveConfig) -> bool:
    """Whether rows carry segments: where documents must not see each other, and where padding could be seen."""
    return attention == "document" or objective.name in ("masked", "span_corruption")


def _corrupted(num_tokens: int, rate: float, mean_span_length: float) -> tuple[int, int]:
    tokens, spans = noise(num_tokens, rate, mean_span_length)
    return num_tokens - tokens + spans + 1, tokens + spans + 1
