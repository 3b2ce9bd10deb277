"""Decisions of a supervisor about one attempt, from what it sees of the ranks: pure, and free of clocks.

The ranks may be processes of this node or of many: `launcher.ranks` and `launcher.slurm.remote` show them as a `View`.
Each look at it gives a `Decision`; what is concluded of the attempt is a `NodeReport`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine import logs
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.heartbeat import Beat
from engine.outcome import Outcome
from launcher import diagnosis
from launcher.diagnosis import Seen
from launcher.signals import FORWARDED
from launcher.verdict import End, Lost, NodeReport
from launcher.watchdog import Watchdog

GRACE_SECONDS = 5.0
"""Seconds that the others have to end by themselves once a rank has failed or their launcher is gone."""
SAME_SIGNAL_SECONDS = 5.0
"""Seconds after the first signal in which others count as part of it: clusters and terminals send several."""
LISTENING_SECONDS = 10.0
"""Seconds after which ranks are sent a signal even if some have given no sign of life."""
SAVING_SECONDS = 60.0
"""Seconds that ranks have to save when their node is lost to the supervisor after a signal."""

_log = logs.logger(__name__)


@dataclass(frozen=True)
class View:
    """The processes of an attempt at one moment."""

    ends: tuple[End, ...]
    """Ends of those processes that have ended."""
    all_ended: bool
    """Every process that was started has ended."""
    alive: bool
    """A process of the attempt is alive, also one that nobody here has started."""
    ranks: frozenset[int]
    """Ranks that are alive."""
    beats: dict[int, Beat | None]
    """Newest sign of life of every rank of the world."""
    said: Outcome | None = None
    """Outcome of this attempt, if a rank has written one."""
    killed_for_memory: int = 0
    """Processes that the kernel has killed for want of memory since the attempt began."""
    lost: Lost | None = None
    """Ranks that are lost together with their node."""


@dataclass(frozen=True)
class Decision:
    """Action that a supervisor takes now."""

    send: signal.Signals | None = None
    """Signal for the ranks."""
    hung: bool = False
    """A rank hangs: take the stacks of all, and pass them to `name_hung`."""
    end: bool = False
    """End what still runs."""


@dataclass
class Decisions:
    """State of one attempt of `num_ranks` ranks, as its supervisor knows it."""

    num_ranks: int
    watchdog: Watchdog
    started_at: float
    """Time of the caller's monotonic clock, as in `look`."""
    first: End | None = None
    """The first process that failed."""
    gone: frozenset[int] = frozenset()
    """Ranks that had ended when the outcome of a failure came to light."""
    lost: Lost | None = None
    """Ranks that were killed, hang, or are lost with their node."""
    _failure_said: bool = False
    _signalled_at: float | None = None
    _unsent: list[signal.Signals] = field(default_factory=list)
    _looked_at: float = 0.0
    _deadline: float | None = None
    """Time at which all that still runs is ended; None while nothing has failed."""

    def __post_init__(self) -> None:
        self._looked_at = self.started_at

    def look(self, view: View, signals: Sequence[signal.Signals], now: float) -> Decision:
        """Return what to do; `signals` are those that have arrived since the last look."""
        send = self._handle_signals(view, signals, now)
        self._notice_lost_nodes(view, now)
        self._notice_failures(view, now)
        hung = self._notice_hangs(view, now)
        return Decision(send, hung, self._deadline is not None and now >= self._deadline)

    def finish(self, view: View) -> None:
        """Take a last look, when all has ended or is about to be ended."""
        self._notice_killed(view)

    def report(self, ends: tuple[End, ...], aside: Outcome | None) -> NodeReport:
        """Return what was seen of the attempt; `ends` are all of them, `aside` an outcome that was left aside."""
        return NodeReport(ends, self.first, self.gone, self.lost, self._signalled_at is not None, aside)

    def silent_seconds(self) -> dict[int, float]:
        """Return the seconds since the last sign of life of each rank."""
        return {rank: watched.silent_seconds for rank, watched in self.watchdog.ranks.items()}

    def name_hung(self, seen: list[Seen], stacks: str) -> None:
        """Conclude which rank hangs from the stacks of all; `stacks` says where they are kept."""
        if not seen:
            return
        culprit, words = diagnosis.suspect(seen), diagnosis.in_words(seen)
        step, phase = (culprit.beat.step, culprit.beat.phase) if culprit.beat else (0, "start")
        how = f"{words}; all stacks: {stacks}"
        self.lost = Lost(frozenset((culprit.global_rank,)), how, step, f"hangs in {phase}")
        _log.warning("%s: ending the ranks\n%s", words, "\n".join(f"    {frame}" for frame in culprit.stack))

    def _handle_signals(self, view: View, signals: Sequence[signal.Signals], now: float) -> signal.Signals | None:
        """Return the first signal for the ranks, once they listen; one that comes later ends the run at once."""
        for number in signals:
            if self._signalled_at is None:
                self._signalled_at = now
                self._unsent.append(FORWARDED[number])
                _log.info("%s: asking the ranks to save and stop; once more ends them at once", number.name)
            elif now - self._signalled_at > SAME_SIGNAL_SECONDS:
                _log.warning("%s again: ending the ranks at once", number.name)
                self._deadline = now
        return self._unsent.pop() if self._unsent and self._listening(view, now) else None

    def _listening(self, view: View, now: float) -> bool:
        """Return True once the ranks are there to hear a signal: one before their handlers would kill them."""
        # A rank gives its first sign of life once its handlers are set (`tools.train`).
        listening = sum(view.beats.get(rank) is not None for rank in view.ranks)
        waited = now - (self._signalled_at or now) > LISTENING_SECONDS
        return bool(view.ranks) and (waited or listening == self.num_ranks)

    def _notice_lost_nodes(self, view: View, now: float) -> None:
        """End the others at once: without the ranks of a lost node they wait for ever.

        While the run is stopping they may be saving, and the cluster that ends the job ends its agents, too.
        """
        if view.lost is not None and self.lost is None:
            self.lost = view.lost
            self._deadline = now if self._signalled_at is None else now + SAVING_SECONDS
            _log.warning("%s: ending the others", view.lost.how)

    def _notice_failures(self, view: View, now: float) -> None:
        """Start the clock of the others as soon as one process has failed, and name it."""
        failed = [end for end in view.ends if end.code not in (EXIT_DONE, EXIT_REQUEUE)]
        if self.first is None and failed:
            self._notice_killed(view)
            # Several may have ended between two looks: a killed one is the cause, the others missed it in a collective.
            self.first = next((end for end in failed if end.code == -signal.SIGKILL), failed[0])
            _log.warning("%s: ending the others", self.lost.how if self.lost else self.first)
        # A rank that has failed says so before it ends; interpreters of large runs take seconds to end.
        if not self._failure_said and view.said is not None and view.said.code not in (EXIT_DONE, EXIT_REQUEUE):
            self._failure_said = True
            # Ranks that had vanished before the first word of a failure are its cause, not its consequence.
            self.gone = frozenset(range(self.num_ranks)) - view.ranks
        if self._deadline is None and (failed or self._failure_said or view.all_ended):
            self._deadline = now + GRACE_SECONDS

    def _notice_killed(self, view: View) -> None:
        """Name the ranks that were killed by SIGKILL, which the supervisor has not sent yet."""
        killed = {end.global_rank for end in view.ends if end.code == -signal.SIGKILL and end.global_rank is not None}
        if self.lost is not None or not killed:
            return
        beats = {rank: view.beats.get(rank) for rank in sorted(killed)}
        told = [
            f"rank {rank} was killed by SIGKILL" + (f" {beat.where}" if beat is not None else "")
            for rank, beat in beats.items()
        ]
        # The counter is the node's: the kernel may have killed another user's process, so it is told and not concluded.
        if (memory := view.killed_for_memory) > 0:
            told.append(f"the kernel has killed for want of memory meanwhile ({memory} times on this node)")
        steps = [beat.step for beat in beats.values() if beat is not None]
        self.lost = Lost(frozenset(killed), "; ".join(told), max(steps, default=0), "killed by SIGKILL")

    def _notice_hangs(self, view: View, now: float) -> bool:
        """Return True if a rank has been silent for too long; then all are ended."""
        # The time is taken before the deadline is looked at, so that no part of it counts twice.
        seconds, self._looked_at = now - self._looked_at, now
        if self._deadline is not None or self.watchdog.look(view.beats, seconds) is None:
            return False
        self._deadline = now
        return True
