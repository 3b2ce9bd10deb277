"""Fill-in-the-middle: documents rearranged so that a causal model learns to write what stands between two parts.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle": cut in three at two random
places (here between tokens), each part behind its mark, the middle last; half the time the suffix stands before the
prefix. Departure: a row that grows beyond its length loses its end. Pure function of row and random words.
"""

from __future__ import annotations

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.causal import CausalSampler
from engine.data.objectives.draws import below, halves
from engine.data.objectives.packing import Row
from engine.data.objectives.sampling import SamplerContext
from engine.data.tokenizer.vocabulary import Vocabulary

SHORTEST = 3
"""Tokens that a document needs to be cut in three."""


def missing(vocabulary: Vocabulary, sequence_length: int, objective: ObjectiveConfig) -> str | None:
    """Return the special tokens that a tokenizer lacks, in words; None where it has all."""
    del sequence_length, objective
    return None if vocabulary.fill else "marks of prefix, middle and suffix"


def make_sampler(context: SamplerContext) -> CausalSampler:
    """Return the sampler of a data set."""
    return _Sampler(context)


class _Sampler(CausalSampler):
    """Causal rows, with some of their documents rearranged."""

    def read(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int):
        rows = [self.row(shard_row) for shard_row in shard_rows.tolist()]
        context = self.context
        drawn = context.words(samples_B3, len(rows), num_words(context.length)) if rows else np.empty((0, 0))
        changed = [
            rearrange(row, context.length, context.objective, context.vocabulary, self.eos_id, drawn[b])
            for b, row in enumerate(rows)
        ]
        return self.laid_out(changed, num_rows)


def num_words(length: int) -> int:
    """Return the number of random words of a row: two for each of its documents."""
    return 2 * (length + 1)


def rearrange(
    row: Row, length: int, objective: ObjectiveConfig, vocabulary: Vocabulary, eos_id: int, words_W: np.ndarray
) -> Row:
    """Return the row with some of its documents rearranged, cut to at most `length` tokens."""
    assert row.successors is not None
    stretch = np.append(row.tokens, row.successors[-1:]).astype(np.int64)
    drawn = halves(words_W[None])[0].reshape(-1, 4)
    parts = np.split(stretch, row.ends + 1)
    is_forgotten = _are_forgotten(row)
    parts = [_rearranged(part, objective, vocabulary, eos_id, drawn[i]) for i, part in enumerate(parts)]
    begins = np.cumsum([part.size for part in parts])[:-1]
    whole = np.concatenate(parts)[: length + 1]
    begins = begins[begins < whole.size]
    starts = begins[begins < whole.size - 1]
    if is_forgotten is None:
        return Row(whole[:-1], whole[1:], starts, begins - 1)
    forgotten = np.repeat(is_forgotten, [part.size for part in parts])[1 : whole.size]
    return Row(whole[:-1], whole[1:], starts, begins - 1, forgotten)


def _are_forgotten(row: Row) -> np.ndarray | None:
    """Return True for each document of a row that is forgotten; None where none is."""
    if row.forgotten is None:
        return None
    # the row's first token is no target, so `forgotten` begins with the second; a first document of that one alone is
    # never rearranged, and predicts nothing of its own
    return np.array([part.any() for part in np.split(np.append(False, row.forgotten), row.ends + 1)])


def _rearranged(
    part: np.ndarray, objective: ObjectiveConfig, vocabulary: Vocabulary, eos_id: int, drawn: np.ndarray
) -> np.ndarray:
    """Return one document; `drawn` are four uint32: is it rearranged, in which order, and the two cuts."""
    text, end = (part[:-1], part[-1:]) if part[-1] == eos_id else (part, part[:0])
    if text.size < SHORTEST or drawn[0] >= round(objective.fill_rate * 2**32):
        return part
    one, other = sorted(below(drawn[2:], text.size + 1).tolist())
    prefix, middle, suffix = text[:one], text[one:other], text[other:]
    before, between, behind = (np.array([number]) for number in vocabulary.fill)
    if drawn[1] < round(objective.suffix_first_share * 2**32):
        return np.concatenate([before, behind, suffix, between, prefix, middle, end])
    return np.concatenate([before, prefix, behind, suffix, between, middle, end])
