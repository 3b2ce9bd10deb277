"""Detection of a hanging rank from heartbeats alone, pure; `launcher.diagnosis` finds the rank that is the cause.

Silence is counted in the supervisor's own waking time, so that a node that was suspended, or a supervisor that was
stopped together with its ranks, wakes up to no false alarm. The limit follows the phase that a rank is in; within a
step it is a multiple of the usual step, with a floor, once enough steps were seen to know what is usual.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from engine.heartbeat import Beat, Phase

STARTING: frozenset[Phase] = frozenset(("start", "load"))
SAVING: frozenset[Phase] = frozenset(("save", "end"))
STEPS_TO_KNOW = 3
"""Steps after which the usual one is known: the first are slow (memory, kernels, connections)."""
LONGEST_TICK_SECONDS = 1.0
"""Largest number of seconds of silence that one look adds; a longer gap means that the supervisor was held up."""


class Limits(Protocol):
    """The limits of `LaunchConfig` (`launch.*` of a run) that apply to silence."""

    @property
    def step_limit_seconds(self) -> float: ...
    @property
    def step_limit_factor(self) -> float: ...
    @property
    def start_limit_seconds(self) -> float: ...
    @property
    def save_limit_seconds(self) -> float: ...


@dataclass
class _Watched:
    beat: Beat | None = None
    silent_seconds: float = 0.0
    step_began: Beat | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    def hear(self, beat: Beat | None) -> None:
        """Take over a new beat, and the time from one step's beginning to the next one's."""
        self.beat, self.silent_seconds = beat, 0.0
        # A run that loads again (a rollback) would count the loading as a step.
        if beat is None or beat.phase in STARTING:
            self.step_began = None
            return
        began = self.step_began
        if began is None or beat.step > began.step:
            if began is not None:
                count = beat.step - began.step
                # Several steps may pass between two looks: each gets an even share, so that the median weighs steps.
                self.step_seconds.extend([(beat.seconds - began.seconds) / count] * count)
            self.step_began = beat


@dataclass
class Watchdog:
    """Seconds of silence of each rank in one attempt, and the usual time of a step.

    Times of beats are subtracted for one rank only: ranks of different nodes have clocks of their own."""

    limits: Limits
    ranks: dict[int, _Watched] = field(default_factory=dict)

    def look(self, beats: dict[int, Beat | None], seconds: float) -> int | None:
        """Return a rank that has been silent for too long, or None; `seconds` are those since the last look.

        A rank without a beat is one that starts: it may hang before its first.
        """
        for global_rank, beat in beats.items():
            watched = self.ranks.setdefault(global_rank, _Watched())
            if beat != watched.beat:
                watched.hear(beat)
            else:
                watched.silent_seconds += min(seconds, LONGEST_TICK_SECONDS)
        silent = [
            (watched.silent_seconds, global_rank)
            for global_rank, watched in self.ranks.items()
            if watched.silent_seconds > self.limit_seconds(watched.beat.phase if watched.beat else "start")
        ]
        # Any of them would do to raise the alarm: all ranks are looked at then.
        return max(silent)[1] if silent else None

    def limit_seconds(self, phase: Phase) -> float:
        """Return the seconds that a rank may be silent in a phase."""
        limits, usual = self.limits, self.usual_step_seconds
        if phase in SAVING:
            return limits.save_limit_seconds
        if phase in STARTING or usual is None:
            # Also for steps while the usual one is unknown: the first ones compile kernels and open connections.
            return max(limits.start_limit_seconds, limits.step_limit_seconds)
        return max(limits.step_limit_seconds, limits.step_limit_factor * usual)

    @property
    def usual_step_seconds(self) -> float | None:
        """Median of the last steps of the slowest rank; None while too few were seen of every rank."""
        known = [watched.step_seconds for watched in self.ranks.values() if len(watched.step_seconds) >= STEPS_TO_KNOW]
        return max(map(statistics.median, known), default=None)

    @property
    def last_step(self) -> int | None:
        """Steps that the rank with the most has done; None before the first beat."""
        return max((watched.beat.step for watched in self.ranks.values() if watched.beat is not None), default=None)
