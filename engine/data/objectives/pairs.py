"""Pairs of segments for BERT: the sentences of a shard that make sample i, and the exchange of second segments.

Documents are cut into segments of consecutive sentences, each at most half of what a row holds, so that any two fit
together and nothing is ever cut off; two segments that follow one another make a sample. In each epoch half of the
samples exchange their second segments, each with one of another document of the shard (next-sentence prediction,
Devlin et al. 2019, with a truly random second document), or swap the two (sentence order, Lan et al. 2020).
Invariants: an epoch visits every sentence exactly once, and sample i of a shard is a function of (sentence offsets,
capacity, seed, epoch, shard). A segment that is left alone in its document is joined to one of another document
(next sentence), or stands alone with no pair to predict (sentence order).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from engine.config.schema.objective import PairKind
from engine.data.objectives.draws import PURPOSE_PAIRS, below, halves, words
from engine.data.shards.dataset import TokenDataset

IN_ORDER, OTHER = 0, 1
"""The labels, as in Hugging Face: the second segment follows the first, or is random or swapped."""
NONE = -1

_PLANS_KEPT = 128


class Segments(NamedTuple):
    """The segments of a shard, and the samples that they make; the second segment is still the following one."""

    bounds: np.ndarray  # (segments, 2) int64: first token, and the one behind the last
    documents: np.ndarray  # (segments,) int64
    firsts: np.ndarray  # (samples,) int64: segments that another follows in their document
    lone: np.ndarray  # (rest,) int64: segments without a neighbour, one of a document at most


class Arrangement(NamedTuple):
    """The samples of a shard in one epoch: `first` and `second` segment (or NONE), label, and whether it counts."""

    first: np.ndarray
    second: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray


class Pairs:
    """The samples of a data set's shards."""

    name = "pairs"

    def __init__(self, dataset: TokenDataset, capacity: int, kind: PairKind, seed: int) -> None:
        """Make samples of at most `capacity` tokens in both segments together. The shards must have sentences."""
        self._dataset, self._capacity, self._seed = dataset, capacity, seed
        self._kind: PairKind = kind
        self._segments: OrderedDict[int, Segments] = OrderedDict()
        self._arrangements: OrderedDict[tuple[int, int], Arrangement] = OrderedDict()

    def count(self, shards: np.ndarray) -> np.ndarray:
        """Return the samples in each of the shards (n,), (n,) int64, the same in every epoch. Raises `DataError`."""
        return np.array([self._count(self.segments(number)) for number in shards.tolist()], np.int64)

    def pair(self, number: int, row: int, epoch: int) -> tuple[list[tuple[int, int]], int, bool]:
        """Return the bounds in the shard of the one or two segments of a sample, its label, and whether that counts."""
        bounds = self.segments(number).bounds
        first, second, labels, labelled = self._arranged(number, epoch)
        chosen = [segment for segment in (int(first[row]), int(second[row])) if segment != NONE]
        return [tuple(bounds[segment].tolist()) for segment in chosen], int(labels[row]), bool(labelled[row])

    def rows_of(self, number: int, documents: np.ndarray, epoch: int) -> np.ndarray:
        """Return the samples of a shard in an epoch with a segment of its documents (n,), (rows,) int64, rising."""
        mine = np.flatnonzero(np.isin(self.segments(number).documents, documents))
        first, second, _, _ = self._arranged(number, epoch)
        return np.flatnonzero(np.isin(first, mine) | np.isin(second, mine))

    def segments(self, number: int) -> Segments:
        """Return the segments of a shard. Raises `DataError` where its offsets are damaged."""
        found = self._segments.get(number)
        if found is None:
            documents, sentences = self._dataset.offsets(number)
            assert sentences is not None, "checked when the sampler was made"
            found = self._segments[number] = cut(documents, sentences, self._capacity // 2)
            if len(self._segments) > _PLANS_KEPT:
                self._segments.popitem(last=False)
        return found

    def _count(self, segments: Segments) -> int:
        alone = segments.lone.size
        return segments.firsts.size + (-(-alone // 2) if self._kind == "next_sentence" else alone)

    def _arranged(self, number: int, epoch: int) -> Arrangement:
        found = self._arrangements.get((number, epoch))
        if found is None:
            found = arrange(self.segments(number), self._kind, self._seed, epoch, number)
            self._arrangements[number, epoch] = found
            if len(self._arrangements) > _PLANS_KEPT:
                self._arrangements.popitem(last=False)
        return found


def cut(documents: np.ndarray, sentences: np.ndarray, limit: int) -> Segments:
    """Return a shard's segments of at most `limit` tokens; longer sentences are cut, ends of text are left out."""
    starts, ends = _sentence_parts(documents, sentences, limit)
    owners = np.searchsorted(documents, starts, side="right") - 1
    last = np.searchsorted(owners, owners, side="right")  # (parts,): the first part of the next document
    # (parts,): for a segment that begins with a part, the first part that is no longer in it
    following = np.minimum(np.searchsorted(ends, starts + limit, side="right"), last).tolist()
    heads, part = [], 0
    while part < starts.size:
        heads.append(part)
        part = following[part]
    firsts = _with_even_ends(np.array(heads, np.int64), starts, ends, owners)
    bounds = np.stack([starts[firsts], ends[np.append(firsts[1:], starts.size) - 1]], axis=1)
    owner = owners[firsts]
    begin = np.searchsorted(owner, owner, side="left")
    index = np.arange(owner.size) - begin  # number of the segment within its document
    has_next = np.append(owner[1:] == owner[:-1], False)[: owner.size]
    # segments 0, 1 and 2 of a document: 0 and 1 make a sample, 2 is left alone
    even = index % 2 == 0
    return Segments(bounds, owner, np.flatnonzero(even & has_next), np.flatnonzero(even & ~has_next))


def _sentence_parts(documents: np.ndarray, sentences: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first tokens, ends) of all sentences, long ones in parts of at most `limit` tokens."""
    # a document's last sentence without its end of text; what is then empty is no sentence
    starts, ends = sentences[:-1], sentences[1:] - np.isin(sentences[1:], documents[1:])
    starts, ends = starts[ends > starts], ends[ends > starts]
    # sentences of 5 and 2 tokens, limit 3: counts (2, 1), parts (0, 1, 0), of 3, 2 and 2 tokens
    counts = -(-(ends - starts) // limit)
    part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    cuts = np.repeat(starts, counts) + part * limit
    return cuts, np.minimum(cuts + limit, np.repeat(ends, counts))


def _with_even_ends(firsts: np.ndarray, starts: np.ndarray, ends: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return the segments' first parts; a document's last odd segment is cut in two if it has two parts or more."""
    owner = owners[firsts]
    stops = np.append(firsts[1:], starts.size)
    is_last = np.append(owner[1:] != owner[:-1], True)[: owner.size]
    index = np.arange(owner.size) - np.searchsorted(owner, owner, side="left")
    odd = np.flatnonzero(is_last & (index % 2 == 0) & (stops - firsts > 1))
    middles = (starts[firsts[odd]] + ends[stops[odd] - 1]) // 2
    # at least one part on each side
    halves_at = np.clip(np.searchsorted(starts, middles), firsts[odd] + 1, stops[odd] - 1)
    return np.sort(np.concatenate([firsts, halves_at]))


def arrange(segments: Segments, kind: PairKind, seed: int, epoch: int, shard: int) -> Arrangement:
    """Return the samples of a shard in an epoch."""
    joined, lone = segments.firsts, segments.lone
    drawn = words(seed, PURPOSE_PAIRS, np.array([[epoch, shard, 0]]), 2 * segments.bounds.shape[0] + 2)[0]
    # the first word turns the circle of `_exchanged`; then one key for each segment, and one for each document
    keys, document_keys = np.array_split(drawn[2:], 2)
    if kind == "sentence_order":
        # the highest bit is a fair coin
        swapped = np.append(keys[joined] >> np.uint64(63) == 1, np.zeros(lone.size, bool))
        first, second = np.append(joined, lone), np.append(joined + 1, np.full(lone.size, NONE))
        first, second = np.where(swapped, second, first), np.where(swapped, first, second)
        return Arrangement(first, second, swapped.astype(np.int64), np.arange(first.size) < joined.size)
    lone = lone[np.argsort(keys[lone], kind="stable")]
    couples = lone.size // 2
    first = np.concatenate([joined, lone[: lone.size - couples]])
    second = np.concatenate([joined + 1, lone[lone.size - couples :], np.full(lone.size - 2 * couples, NONE)])
    labels = np.concatenate([np.full(joined.size, IN_ORDER), np.full(first.size - joined.size, OTHER)])
    # half of all samples are to be random; couples of lone segments are that already
    wanted = min(max(first.size // 2 - couples, 0), joined.size)
    chosen = np.argsort(keys[joined], kind="stable")[:wanted]
    documents = segments.documents
    if documents.size and documents[-1] >= document_keys.size:
        # Documents without a segment (nothing but an end of text) have numbers, too: there may be fewer keys than
        # numbers. Then, and only then, since the order of all other shards must stay, those with segments are counted.
        documents = np.unique(documents, return_inverse=True)[1]
    moved, partners = _exchanged(chosen, documents[joined], keys[joined], document_keys, halves(drawn[None])[0])
    second[moved], labels[moved] = joined[partners] + 1, OTHER
    return Arrangement(first, second, labels, second != NONE)


def _exchanged(
    chosen: np.ndarray, documents: np.ndarray, keys: np.ndarray, document_keys: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples, samples whose second segments they take): a permutation, no two of one document.

    Samples stand in a circle, those of a document side by side, documents in random order; all move on by the same
    random number, from the size of the largest document to all but that. A document with more than half of the
    chosen samples has the rest stay in order.
    """
    which = documents[chosen]
    counts = np.bincount(which, minlength=1)
    too_many = 2 * int(counts.max()) - chosen.size
    # more than half: without `too_many` of them, the document has exactly half of what is left
    if too_many > 0:
        chosen = np.delete(chosen, np.flatnonzero(which == counts.argmax())[-too_many:])
    if not chosen.size:
        return chosen, chosen
    largest = int(np.bincount(documents[chosen]).max())
    circle = chosen[np.lexsort((keys[chosen], document_keys[documents[chosen]]))]
    # `largest` or more leads out of the own document, circle.size - largest or less does not lead back into it
    further = largest + int(below(drawn[:1], circle.size - 2 * largest + 1)[0])
    return circle, np.roll(circle, -further)
