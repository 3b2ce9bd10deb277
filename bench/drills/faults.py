"""The faults of the drills, and the measurement of one: a run on the simulated cluster is hit, and goes on.

A drill ends when the run has ended as it should; where it does not, there is no measurement.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import EXIT_DONE, EXIT_REQUEUE
from launcher.slurm.job_logs import attempts
from tests.slurm.cluster import Cluster, ClusterError
from tests.slurm.files import Hardware
from tests.slurm.launches import Launch, launch, requeued

AWAY_SECONDS = 30.0
"""Seconds that the controller is away in its drill."""
BAR_SECONDS = 30.0
"""Seconds from a fault to the first step of the next attempt that a drill with a bar may take on a quiet machine."""
STEP_LIMIT_SECONDS = 10.0
"""`launch.step_limit_seconds` of the drill with a rank that is stopped."""


@dataclass(frozen=True)
class Drill:
    """One fault, and how a run of two ranks on two nodes is hit by it."""

    name: str
    fault: str
    follows: str
    """Consequence, in words for the table."""
    strike: Callable[[Launch], float]
    """Hits the run, and returns the time of the fault in seconds since 1970."""
    nodes: str = "1-2"
    num_nodes: int = 2
    options: tuple[str, ...] = ("--restarts", "1")
    clocks: Mapping[str, int] = field(default_factory=dict)
    next_attempt: int | None = 1
    """Number of the attempt that follows; None where the run is over."""
    code: int = EXIT_DONE
    """Code of the run's outcome."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the run's configuration."""
    freezes: bool = False
    """Rank 1 stops itself."""
    bar_seconds: float | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds after a fault: until it was noticed, and until the first step of the next attempt was done."""

    noticed: float
    first_step: float | None
    load: float
    """Load average of the machine when the fault struck."""


def _hit(strike: Callable[[Launch], object]) -> Callable[[Launch], float]:
    """Return the strike that notes its time."""

    def timed(job: Launch) -> float:
        now = time.time()
        strike(job)
        return now

    return timed


def _kill_rank(job: Launch) -> None:
    job.cluster.run("pkill", "-KILL", "-f", "tests.slurm.(ran[k]|stand_i[n])", on="node2")


def _kill_rank_without_controller(job: Launch) -> None:
    job.cluster.stop_controller()
    _kill_rank(job)
    job.wait(lambda: any("slurmctld gives no answer" in words for words in job.said()), "the controller is not missed")
    time.sleep(AWAY_SECONDS)
    job.cluster.start_controller()


def _preempt(job: Launch) -> None:
    job.cluster.sbatch("true", "--partition=urgent", "--nodes=2", "--exclusive")


def _frozen_at(job: Launch) -> float:
    """Return the time at which rank 1 has stopped itself: it makes its file just before."""
    return (job.cluster.folder / "at-1.0").stat().st_mtime


REQUEUED: dict[str, Any] = {"nodes": "2", "options": ("--requeues", "1"), "next_attempt": 1000}
SLOW = {"kill_wait": 120}
"""Time to save, as a cluster with a grace time gives it."""

DRILLS = (
    Drill(
        "killed rank",
        "a rank is killed",
        "named; restart inside of the job",
        _hit(_kill_rank),
    ),
    Drill(
        "frozen rank",
        f"a rank is stopped (`launch.step_limit_seconds: {STEP_LIMIT_SECONDS:.0f}`)",
        "named with all stacks; restart inside of the job",
        _frozen_at,
        freezes=True,
        changes={"launch": {"step_limit_seconds": STEP_LIMIT_SECONDS, "step_limit_factor": 1.0}},
        bar_seconds=BAR_SECONDS,
    ),
    Drill(
        "power loss",
        "a node loses its power, `SlurmdTimeout` 10 s",
        "restart inside of the job on the others",
        _hit(lambda job: job.cluster.power_off("node2")),
        bar_seconds=BAR_SECONDS,
    ),
    Drill(
        "power loss, default clocks",
        "the same, `SlurmdTimeout` 300 s (Slurm's default)",
        "the same, before Slurm has noticed",
        _hit(lambda job: job.cluster.power_off("node2")),
        clocks={"slurmd_timeout": 300},
    ),
    Drill(
        "frozen node",
        "a node stands still",
        "restart inside of the job on the others; its ranks are ended when it wakes up",
        _hit(lambda job: job.cluster.freeze("node2")),
    ),
    Drill(
        "power loss of the first node",
        "the first node loses its power",
        "an agent requeues the job",
        _hit(lambda job: job.cluster.power_off("node1")),
        num_nodes=3,
        **REQUEUED,
    ),
    Drill(
        "first node cut off",
        "the first node loses its network",
        "an agent requeues the job; what the old attempt still writes is refused",
        _hit(lambda job: job.cluster.cut("node1")),
        num_nodes=3,
        **REQUEUED,
    ),
    Drill(
        "time limit",
        "the time limit is near (`signal_seconds`, 300 by default)",
        "the ranks save; the job is requeued",
        _hit(lambda job: job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)),
        **REQUEUED,
    ),
    Drill(
        "preemption",
        "preemption by a job of one second",
        "the ranks save; Slurm requeues the job, or its conductor does",
        _hit(_preempt),
        clocks=SLOW,
        **REQUEUED,
    ),
    Drill(
        "controller away",
        f"slurmctld is away for {AWAY_SECONDS:.0f} s, and a rank is killed meanwhile",
        "the restart waits for Slurm's answer",
        _hit(_kill_rank_without_controller),
    ),
    Drill(
        "scancel",
        "`scancel`",
        "the ranks save, if `KillWait` of the cluster (30 s) is enough; not requeued",
        _hit(lambda job: job.cluster.run("scancel", job.number)),
        clocks=SLOW,
        next_attempt=None,
        code=EXIT_REQUEUE,
    ),
)


def measure(drill: Drill, stand_ins: bool = False) -> Measured:
    """Run a drill and return its seconds; with `stand_ins` for the ranks they mean little.

    Raises:
        ClusterError: the run did not go on as it should.
    """
    with (
        tempfile.TemporaryDirectory(prefix="drill-") as folder,
        Cluster(Path(folder), Hardware(num_nodes=drill.num_nodes, **drill.clocks)) as cluster,
    ):
        if drill.freezes:
            (cluster.folder / "freeze-1").touch()
            (cluster.folder / "go").touch()
        job = launch(cluster, drill.nodes, *drill.options, stand_ins=stand_ins, **drill.changes)
        job.wait_for_hold()
        load = os.getloadavg()[0]
        fault = drill.strike(job)
        noticed = job.wait(lambda: _noticed(job, drill), "the fault is not noticed")
        job.go()
        first_step = None
        if drill.next_attempt is not None:
            file = cluster.folder / f"first-0.{drill.next_attempt}"
            job.wait(file.exists, "there is no next attempt")
            first_step = file.stat().st_mtime - fault
        found = job.outcome_of(drill.next_attempt or 0)
        if found.code != drill.code:
            raise ClusterError(f"{drill.name}: {found}")
        return Measured(noticed - fault, first_step, load)


def _noticed(job: Launch, drill: Drill) -> float | None:
    """Return the time at which the first attempt was given up: its end was noted, or the job was requeued."""
    ended = [one.ended for one in attempts(job.folder) if one.number == 0 and one.ended is not None]
    if ended:
        return ended[0]
    # Where the conductor is lost nobody notes the end.
    return time.time() if drill.num_nodes > 2 and requeued(job) else None
