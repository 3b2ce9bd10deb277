"""Decisions of a supervisor about one attempt: views in, decisions out, with no process and no clock."""

from __future__ import annotations

import signal
from typing import Any

from engine.config.schema.run import LaunchConfig
from engine.heartbeat import Beat, Phase
from engine.outcome import Outcome
from launcher.decisions import (
    GRACE_SECONDS,
    LISTENING_SECONDS,
    SAME_SIGNAL_SECONDS,
    SAVING_SECONDS,
    Decision,
    Decisions,
    View,
)
from launcher.diagnosis import Frame, Seen
from launcher.verdict import End, Lost
from launcher.watchdog import Watchdog

USR1, TERM = signal.SIGUSR1, signal.SIGTERM
LIMITS = LaunchConfig(step_limit_seconds=3.0, start_limit_seconds=3.0)


def beat(count: int, step: int = 4, phase: Phase = "forward and backward") -> Beat:
    return Beat(count, step, phase, float(count))


def view(**changes: Any) -> View:
    """Two ranks that live and have given a sign of life."""
    both: dict[int, Beat | None] = {0: beat(1), 1: beat(1)}
    return View(**{"ends": (), "all_ended": False, "alive": True, "ranks": frozenset((0, 1)), "beats": both} | changes)


def decisions() -> Decisions:
    return Decisions(2, Watchdog(LIMITS), started_at=0.0)


def test_nothing_to_do_while_ranks_live() -> None:
    made = decisions()
    assert made.look(view(), (), 0.1) == Decision()
    assert made.report((), None).first is None


def test_the_first_signal_goes_to_ranks_that_listen() -> None:
    """One that comes during imports would kill a rank whose handlers are not set: it waits for all first beats."""
    made = decisions()
    deaf = view(beats={0: beat(1), 1: None})
    assert made.look(deaf, (USR1,), 0.1).send is None
    assert made.look(view(), (), 0.2).send == USR1
    assert made.look(view(), (), 0.3).send is None, "once"
    assert made.report((), None).stopping


def test_ranks_that_never_listen_are_told_in_the_end() -> None:
    made = decisions()
    deaf = view(beats={0: None, 1: None})
    assert made.look(deaf, (signal.SIGHUP,), 0.1).send is None
    assert made.look(deaf, (), 0.2 + LISTENING_SECONDS).send == TERM


def test_signals_at_once_are_one_and_a_later_one_ends_the_run() -> None:
    made = decisions()
    assert made.look(view(), (TERM, USR1), 0.1) == Decision(send=TERM)
    assert made.look(view(), (USR1,), 0.2 + SAME_SIGNAL_SECONDS / 2) == Decision()
    assert made.look(view(), (TERM,), 0.3 + SAME_SIGNAL_SECONDS).end


def test_a_killed_rank_is_the_cause_and_the_others_get_their_last_words() -> None:
    made = decisions()
    ends = (End("rank-0", 1), End("rank-1", -signal.SIGKILL))
    assert not made.look(view(ends=ends), (), 1.0).end
    assert made.lost == Lost(frozenset((1,)), made.lost.how if made.lost else "", 4, "killed by SIGKILL")
    assert made.first == End("rank-1", -signal.SIGKILL)
    assert made.look(view(ends=ends), (), 1.1 + GRACE_SECONDS).end


def test_memory_is_told_beside_a_killed_rank() -> None:
    made = decisions()
    made.look(view(ends=(End("rank-1", -signal.SIGKILL),), killed_for_memory=2), (), 1.0)
    assert made.lost is not None
    assert "the kernel has killed for want of memory meanwhile (2 times" in made.lost.how


def test_a_lost_node_ends_the_others_at_once() -> None:
    made = decisions()
    lost = Lost(frozenset((1,)), "node n2 is lost", 4, "lost n2")
    assert made.look(view(lost=lost), (), 1.0).end
    # What the others then say of it is no news.
    made.finish(view(lost=lost, ends=(End("rank-0", -signal.SIGKILL),)))
    assert made.lost == lost


def test_a_node_lost_while_the_run_stops_leaves_the_ranks_time_to_save() -> None:
    """A cluster that cancels a job ends its agents, too: the ranks may be saving all the same."""
    made = decisions()
    lost = Lost(frozenset((1,)), "node n2 is lost", 4, "lost n2")
    assert made.look(view(), (TERM,), 0.1).send == TERM
    assert not made.look(view(lost=lost), (), 1.0).end
    assert made.look(view(lost=lost), (), 1.1 + SAVING_SECONDS).end


def test_ranks_gone_before_the_first_word_are_its_cause() -> None:
    made = decisions()
    failed = Outcome("j", 0, 1, 4, 0, "connection closed")
    made.look(view(said=failed, ranks=frozenset((0,))), (), 1.0)
    made.look(view(said=failed, ranks=frozenset()), (), 1.1)
    assert made.gone == {1}


def test_success_and_requeue_are_no_failures() -> None:
    for code in (0, 85):
        made = decisions()
        assert not made.look(view(said=Outcome("j", 0, code, 9), ends=(End("rank-0", code),)), (), 1.0).end
        assert (made.first, made.gone) == (None, frozenset())


def test_a_silent_rank_is_looked_at_and_named() -> None:
    made = decisions()
    made.look(view(), (), 0.1)
    found = [made.look(view(), (), 0.1 + tick / 2) for tick in range(1, 10)]
    assert [decision.hung for decision in found].count(True) == 1, "stacks are taken once"
    assert found[-1].end
    stack = (Frame("all_reduce", "torch/distributed/distributed_c10d.py", 1),)
    made.name_hung([Seen(0, "S", beat(1), 3.0, stack), Seen(1, "T", beat(1), 3.0)], "hang-0.txt")
    assert made.lost is not None
    assert (made.lost.ranks, made.lost.cause) == ({1}, "hangs in forward and backward")
    assert made.lost.how.endswith("all stacks: hang-0.txt")
