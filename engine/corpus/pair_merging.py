"""New tokens learnt from text that an existing tokenizer has split: frequent neighbours become one token.

Byte-pair encoding (Sennrich et al. 2016, section 3.2) that goes on where a tokenizer ends: words are sequences of its
tokens, and the commonest pair of neighbours is joined, again and again. What the tokenizer does with other text can
change only where a joined pair occurs. Ties are broken by spelling, so that equal text gives equal tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

Word = tuple[str, ...]
Pair = tuple[str, str]
LEAST_COUNT = 2
"""Occurrences in the text that a pair needs."""


class Join(NamedTuple):
    """Two neighbours that become one token, and how often they stood beside each other then."""

    left: str
    right: str
    joined: str
    count: int


class PairMerger:
    """Words as sequences of tokens with their counts, and how often each pair of neighbours occurs in them."""

    def __init__(self, words: Mapping[Word, int], join: Callable[[str, str], str | None]) -> None:
        """Count the pairs; `join` spells the token that a pair becomes, or gives None for a pair that stays."""
        self._words = [list(word) for word in words]
        self._counts = list(words.values())
        self._join = join
        self._pairs: Counter[Pair] = Counter()
        self._holders: dict[Pair, set[int]] = defaultdict(set)
        for number in range(len(self._words)):
            self._count(number, 1)
        self.occurrences: Counter[str] = Counter()
        """Occurrences of each joined token that no later join has taken in."""
        self.num_in_use = 0
        """Number of joined tokens that occur."""
        # Entries whose count has changed since are passed over, and the new count is entered beside them.
        self._heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapq.heapify(self._heap)

    def joins(self) -> Iterator[Join]:
        """Yield joins, the commonest first, as long as a pair occurs often enough."""
        while self._heap:
            count, pair = heapq.heappop(self._heap)
            if -count < LEAST_COUNT:
                return
            if self._pairs[pair] != -count:
                continue  # an entry from before a join nearby
            if (joined := self._join(*pair)) is not None:
                self._apply(pair, joined)
                yield Join(*pair, joined, -count)

    def _count(self, number: int, sign: int) -> set[Pair]:
        """Add (or with -1 remove) the pairs of a word; return them."""
        word, count = self._words[number], sign * self._counts[number]
        found = set()
        for pair in pairwise(word):
            self._pairs[pair] += count
            found.add(pair)
            if sign > 0:
                self._holders[pair].add(number)
        return found

    def _apply(self, pair: Pair, joined: str) -> None:
        changed: set[Pair] = set()
        for number in self._holders.pop(pair):
            changed |= self._count(number, -1)
            before, count = self._words[number], self._counts[number]
            self._words[number] = after = replaced(before, pair, joined)
            made = (len(before) - len(after)) * count
            self._occur(joined, made)
            for part in pair:
                if part in self.occurrences:
                    self._occur(part, -made)
            changed |= self._count(number, 1)
        for one in changed:
            if self._pairs[one] >= LEAST_COUNT:
                heapq.heappush(self._heap, (-self._pairs[one], one))

    def _occur(self, token: str, change: int) -> None:
        before = self.occurrences[token]
        self.occurrences[token] = before + change
        self.num_in_use += (before + change > 0) - (before > 0)


def replaced(word: list[str], pair: Pair, joined: str) -> list[str]:
    """Return a word with each occurrence of a pair as one token, from left to right: a a a -> aa a."""
    found: list[str] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            found.append(joined)
            position += 2
        else:
            found.append(word[position])
            position += 1
    return found
