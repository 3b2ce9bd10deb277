"""Shares of the sources of a run stage, as its tables say, and what of them the state of a loader has to keep.

Weights and the replay ratio may be changed while a run is stopped, and an alarm may raise the ratio between two steps:
the samples that were drawn stay as they were, and from that position on the new table is in force. So a state carries,
beside a hash of the table that drew its samples, how many samples each source has given; no earlier table has to be
known.

K sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

from engine.config.batch_ramp import Ramp
from engine.data.order.mixing import Mixing, Mixture
from engine.data.order.replay_share import MixtureWithReplay, ReplayShare

_OWED_UNIT = 10**6
"""Parts of a sample in which a state keeps what is owed to replay: a rounding far below what any count could show."""


class ShareTable(NamedTuple):
    """Weights of the new sources, and the ratio of replayed samples, by the step of the run stage at which they begin;
    both have a row for step 0."""

    weights: tuple[tuple[int, tuple[int, ...]], ...]
    ratios: tuple[tuple[int, Fraction], ...] | None = None
    """None means that nothing is replayed; else replay is the last source."""

    def ratio(self, step: int) -> Fraction:
        """Return the ratio of replayed samples in a step, 0 where nothing is replayed."""
        return next((ratio for first, ratio in reversed(self.ratios or ()) if first <= step), Fraction(0))

    def raised(self, rows: Sequence[tuple[int, float]]) -> ShareTable:
        """Return the table in which the ratio is, from each step of `rows` on, at least that of the row."""
        if not rows:
            return self
        assert self.ratios is not None, "something is replayed"
        least = [(first, Fraction(str(ratio))) for first, ratio in rows]
        firsts = sorted({first for first, _ in (*self.ratios, *least)})
        ratios = tuple((step, max([self.ratio(step), *(r for first, r in least if first <= step)])) for step in firsts)
        return self._replace(ratios=ratios)


class Begin(NamedTuple):
    """Beginning of a table's shares: a position, the samples of each source by then, and what was owed to replay."""

    position: int
    drawn: tuple[int, ...]
    owed: Fraction = Fraction(0)


@dataclass(frozen=True)
class Shares:
    """The shares of K sources from a position on."""

    table: ShareTable
    limits: tuple[int | None, ...]
    """Most samples of each source; None means no limit."""
    batches: Ramp
    begin: Begin

    @classmethod
    def from_start(cls, table: ShareTable, limits: Sequence[int | None], batches: Ramp) -> Shares:
        """Return the shares of a run stage at its beginning."""
        return cls(table, tuple(limits), batches, Begin(0, (0,) * len(limits)))

    @cached_property
    def mixture(self) -> Mixture:
        """Sources of the positions from `begin` on."""
        if self._replay is None:
            return self._mix_new(lambda position: position)
        return MixtureWithReplay(self._replay, self._mix_new, self.begin.position, self.begin.drawn[-1])

    @cached_property
    def _replay(self) -> ReplayShare | None:
        ratios = self.table.ratios
        return None if ratios is None else ReplayShare(ratios, self.batches, self.begin.position, self.begin.owed)

    def _mix_new(self, num_new: Callable[[int], int]) -> Mixing:
        """Return the mixture of the new sources; `num_new` says how many new samples come before a position."""
        (_, first), *later = self.table.weights
        count = len(first)
        rows = [(num_new(max(self.begin.position, self.batches.samples(step))), weights) for step, weights in later]
        return Mixing(first, self.limits[:count], rows, num_new(self.begin.position), self.begin.drawn[:count])

    def changed(self, table: ShareTable, position: int) -> Shares:
        """Return the shares of a stream that goes on with another table from a position on."""
        owed = Fraction(0) if self._replay is None else self._replay.owed(position)
        # as a state keeps it, so that a run that goes on and one that is restored draw alike
        kept = Fraction(int(owed * _OWED_UNIT), _OWED_UNIT)
        drawn = tuple(self.mixture.counts(position).tolist())
        return Shares(table, self.limits, self.batches, Begin(position, drawn, kept))

    def state(self, position: int) -> dict[str, Any]:
        """Return what a state at a position keeps; nothing where there is but one source."""
        if len(self.limits) == 1:
            return {}
        owed = 0 if self._replay is None else int(self._replay.owed(position) * _OWED_UNIT)
        begun = self.begin.position, int(self.begin.owed * _OWED_UNIT)
        return (
            {"shares": self._hash}
            | ({"drawn": _packed(self.mixture.counts(position).tolist())} if position else {})
            | ({"owed": owed} if owed else {})
            # no key for shares that began with the run stage
            | ({"begun": [*begun, _packed(self.begin.drawn)]} if self.begin.position else {})
        )

    def restored(self, state: Mapping[str, Any]) -> Shares:
        """Return the shares with which a run goes on from a state: where its table was another one, those of this table
        from the state's position on.

        Raises:
            KeyError, TypeError, ValueError: the state is damaged.
        """
        if len(self.limits) == 1:
            return self
        position, count = int(state["position"]), len(self.limits)
        drawn = _unpacked(state["drawn"], count) if position else (0,) * count
        owed = Fraction(int(state.get("owed", 0)), _OWED_UNIT)
        if sum(drawn) != position:
            raise ValueError(f"{sum(drawn)} samples drawn up to position {position}")
        if state["shares"] != self._hash:
            return Shares(self.table, self.limits, self.batches, Begin(position, drawn, owed))
        if "begun" not in state:
            return Shares.from_start(self.table, self.limits, self.batches)
        begun, owed_then, drawn_then = state["begun"]
        begin = Begin(int(begun), _unpacked(drawn_then, count), Fraction(int(owed_then), _OWED_UNIT))
        return Shares(self.table, self.limits, self.batches, begin)

    @cached_property
    def _hash(self) -> str:
        ratios = self.table.ratios
        rows = [
            [[self.batches.samples(step), weights] for step, weights in self.table.weights],
            None if ratios is None else [[self.batches.samples(step), str(ratio)] for step, ratio in ratios],
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:6]


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _packed(counts: Sequence[int]) -> str:
    """Return counts in base 36, since a state has to stay small: (100, 7) is "2s 7"."""
    found = []
    for count in counts:
        digits = ""
        while count:
            count, digit = divmod(count, 36)
            digits = _DIGITS[digit] + digits
        found.append(digits or "0")
    return " ".join(found)


def _unpacked(text: str, expected: int) -> tuple[int, ...]:
    found = tuple(int(digits, 36) for digits in str(text).split())
    if len(found) != expected or min(found) < 0:
        raise ValueError(f"{len(found)} counts for {expected} sources")
    return found
