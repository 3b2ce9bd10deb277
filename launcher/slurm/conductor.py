"""The conductor of a job, on its batch host: what the batch script becomes. Never imports torch.

It takes the run folder, waits for the agents, and makes attempt after attempt on the nodes that live. Attempts of one
start of the job are numbered on from its requeues x 1000; the job's name stays. A job is requeued, within its limit,
only where the ranks have saved and want to be started again (85), where they failed after they were told to stop (an
earlier checkpoint is there), or where the nodes that are left make no valid world.
Before each attempt Slurm is asked that the job is still this start's: where it was requeued behind our back, a newer
start owns the run folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import heartbeat, logs
from engine.config.load import load_run
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_FAILURE, EXIT_REQUEUE, EnvironmentProblem, PalimpsestError
from engine.plan.shrink import UNKNOWN, world_for
from engine.run_folder import RunFolder, Start
from engine.switch_files import STOP
from launcher.attempts import Ending, run_attempts
from launcher.devices import accelerator
from launcher.environment import RESTARTS_PER_START, hidden_overrides
from launcher.left_over import left_over
from launcher.needs import needs_of
from launcher.restarts import Restarts
from launcher.signals import Signals
from launcher.slurm import client, render, spec, wire
from launcher.slurm.agent import JOB_FOLDER, beats_folder
from launcher.slurm.agents import Agents, Node
from launcher.slurm.fitness import Fitness, plain_needs, without_memory
from launcher.slurm.placement import Placement, place
from launcher.slurm.remote import AgentRanks, Meeting
from launcher.slurm.spec import AGENTS_LOG, JobSpec
from launcher.slurm.step import Step
from launcher.variables import ATTEMPT, JOB, LAUNCHER, OVERRIDES, RUN_FOLDER
from launcher.verdict import Verdict

AGENTS_SECONDS = 180.0
"""Seconds that the agents of all nodes have to come; after that the job goes on with those that are there."""
CONTROLLER_SECONDS = 300.0
"""Seconds that Slurm's controller may be away before an attempt is given up for want of an answer."""
ATTEMPTS_FILE = "attempts.jsonl"
"""File in the folder of the job with one line per attempt: its nodes, its world, its end."""


class NotOurs(EnvironmentProblem):
    """The job was requeued or ended while this start of it was cut off; another start owns the run."""


@dataclass
class JobNodes:
    """The nodes of the job, as a starter of attempts (`launcher.attempts.Starter`)."""

    run: RunConfig
    job: JobSpec
    number: str
    """Number of the job."""
    restarts: int
    """Requeues of the job so far."""
    agents: Agents
    asked: tuple[str, ...]
    """The user's overrides, credentials included."""
    start: Start
    fitness: Fitness
    placement: Placement | None = None
    suspicious: set[str] = field(default_factory=set)
    current: AgentRanks | None = None

    def plan(self) -> str | None:
        """Choose nodes and world of the coming attempt; return them in words, or None where no valid world is left.

        Raises:
            NotOurs: the job is not this start's any more.
            EnvironmentProblem: Slurm's controller gives no answer.
        """
        found = client.patiently(lambda: client.allocated(self.number), CONTROLLER_SECONDS, say)
        if found is None or not found.is_running or found.restarts != self.restarts:
            state = "unknown to Slurm" if found is None else f"{found.state}, requeued {found.restarts} times"
            raise NotOurs(f"job {self.number} is not this start's any more: it is {state}")
        live = self._fit()
        kind = accelerator() if self.job.gpus_per_node else None
        self.placement = place(self.run, live, self.suspicious, self.job.min_nodes, self.job.ranks_per_node, kind)
        if self.placement is None:
            return None
        spare = f"; not used: {', '.join(self.placement.spare)}" if self.placement.spare else ""
        world = self.placement.world
        return f"{world.size} ranks ({world.layout}) on {', '.join(self.placement.nodes)}{spare}"

    def _fit(self) -> list[str]:
        """Return the live nodes that pass their checks.

        Raises:
            EnvironmentProblem: there are some, and all fail.
        """
        live = self.agents.live()
        per_node = self.job.ranks_per_node
        needs = plain_needs(self.run, per_node, self.job.gpus_per_node, len(live), self.start.job)
        world = world_for(self.run, len(live) * per_node, UNKNOWN, per_node) if live else None
        if world is not None:
            needs = needs_of(self.run, world.size, needs)
        return self.fitness.check(live, needs if self.current is None else without_memory(needs))

    def ranks(self, owned: RunFolder) -> AgentRanks:
        """Return the ranks of the attempt for which the run folder is taken."""
        assert self.placement is not None
        by_name = {node.name: node for node in self.agents.all()}
        nodes = [by_name[name] for name in self.placement.nodes]
        self._note({"attempt": owned.start.attempt, "began": time.time(), "nodes": list(self.placement.nodes),
                    "ranks_per_node": self.job.ranks_per_node, "layout": str(self.placement.world.layout)})  # fmt: skip
        host = self._meeting_host(nodes[0])
        self.current = AgentRanks(nodes, self.job.ranks_per_node, owned, self.agents, self._command, host)
        return self.current

    def next(self, verdict: Verdict) -> str | None:
        """Plan the attempt after one that failed; return its world in words, or None where there is none."""
        assert self.current is not None
        self.suspicious |= {self.current.node_of(rank).name for rank in verdict.lost}
        self.start = Start(self.start.job, self.start.attempt + 1)
        return self.plan()

    def ended(self, verdict: Verdict) -> None:
        """Note the end of an attempt for `palimpsest job`."""
        number = self.current.owned.start.attempt if self.current else self.start.attempt
        self._note({"attempt": number, "ended": time.time(), "code": verdict.code, "words": verdict.words,
                    "step": verdict.step, "failed_stop": _failed_stop(verdict)})  # fmt: skip

    def _command(self, meeting: Meeting) -> tuple[list[str], dict[str, str]]:
        """Return the srun of an attempt and its environment."""
        assert self.placement is not None
        assert self.current is not None
        world = self.placement.world
        overrides = [*self.asked, *world.overrides(self.run)]
        hides = self.job.hides_overrides
        number = self.current.owned.start.attempt
        shown = () if hides else overrides
        command = render.rank_step(self.job, list(self.placement.nodes), world.size, number, shown)
        foreign = left_over(os.environ)
        environment = {name: value for name, value in os.environ.items() if name not in foreign}
        environment |= {
            JOB: self.start.job,
            ATTEMPT: str(number),
            LAUNCHER: "slurm",
            RUN_FOLDER: str(self.job.run_folder),
            heartbeat.VARIABLE: str(beats_folder(self.start.job, number)),
            "WORLD_SIZE": str(world.size),
            "LOCAL_WORLD_SIZE": str(self.job.ranks_per_node),
            "MASTER_ADDR": meeting.host,
            "MASTER_PORT": str(meeting.port),
        }
        if hides:
            environment[OVERRIDES] = json.dumps(overrides)
        if self.job.site.tasks.cpus is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.job.site.tasks.cpus))
        return command, environment

    def _meeting_host(self, first: Node) -> str:
        network = self.job.site.network
        if network.address == "interface":
            if not first.address:
                raise EnvironmentProblem(
                    f"node {first.name} has no interface {network.interface} with an IPv4 address",
                    "an interface of every node",
                    "correct network.interface in the site profile (ip addr shows the names)",
                )
            return first.address
        return first.name + network.suffix

    def _note(self, record: dict[str, Any]) -> None:
        """Add a line to the list of attempts; a disk that is full must not end the run."""
        record["job"] = self.number
        try:
            with (self.job.folder / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logs.logger(__name__).warning("%s cannot be written: %s", ATTEMPTS_FILE, error)


def say(words: str) -> None:
    """Tell the user, in the log of the job."""
    print(f"palimpsest launch: {words}", flush=True)


def conduct(job: JobSpec, signals: Signals) -> int:
    """Run the attempts of this start of the job; return the exit code of the batch script."""
    number, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    asked = tuple(hidden_overrides(os.environ)) if job.hides_overrides else job.overrides
    if job.hides_overrides and not asked:
        raise EnvironmentProblem(
            f"{OVERRIDES} is not in the environment of the job, but its overrides hold credentials",
            "a job that inherits the environment of palimpsest launch",
            "submit with --export=ALL (SBATCH_EXPORT unset)",
        )
    run = load_run(job.config, list(asked))
    num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    say(f"job {number}, start {restarts + 1}, {num_nodes} nodes: waiting for an agent on each")
    with Agents() as agents:
        step = _start_agents(job, agents, num_nodes)
        try:
            # Nobody waits for agents that will never come.
            agents.wait(num_nodes, AGENTS_SECONDS, lambda: step.poll() is not None)
            start = Start(number, restarts * RESTARTS_PER_START)
            fitness = Fitness(agents, say)
            nodes = JobNodes(run, job, number, restarts, agents, asked, start, fitness)
            ending = run_attempts(run, nodes, Restarts(job.restarts), say, signals)
            missing = [node.name for node in agents.all() if node.lost or node.name in fitness.unfit]
        finally:
            agents.__exit__()
            _stop(step)
    return _conclude(job, number, restarts, ending, missing, signals)


def _start_agents(job: JobSpec, agents: Agents, num_nodes: int) -> Step:
    environment = dict(os.environ) | {
        wire.TOKEN: agents.token,
        wire.CONDUCTOR: f"{socket.gethostname()}:{agents.port}",
        JOB_FOLDER: str(job.folder),
    }
    return Step(render.agents_step(job, num_nodes), environment, job.folder / AGENTS_LOG)


def _stop(step: Step) -> None:
    """Wait for the agents, which were told to leave; a step on a lost node is left to Slurm."""
    step.wait(wire.BEAT_SECONDS * 6)
    step.kill()


def _conclude(job: JobSpec, number: str, restarts: int, ending: Ending, missing: list[str], signals: Signals) -> int:
    """Say how this start has ended, requeue the job where that is due, and return the exit code."""
    say(ending.verdict.words)
    if ending.refusal:
        say(ending.refusal)
    code, failed_stop = ending.verdict.code, _failed_stop(ending.verdict)
    if not (code == EXIT_REQUEUE or ending.no_world or failed_stop):
        return code
    if (job.run_folder / STOP).exists():
        say(f"not requeued: {job.run_folder / STOP} is there; remove it and submit the job again to go on")
        return code
    if signal.SIGINT in signals.arrived:
        say("not requeued: it was cancelled with `palimpsest job cancel`; submit it again to go on")
        return code
    if not job.site.requeue or restarts >= job.requeues:
        why = f"all {job.requeues} requeues are used up" if job.site.requeue else "this site requeues no jobs"
        say(f"not requeued: {why}; submit it again to go on")
        return code
    if failed_stop and _start_before_failed_to_stop(job, number, restarts):
        say("not requeued: two starts in a row have failed while they stopped; submit it again to go on")
        return code
    found = client.patiently(lambda: client.allocated(number), CONTROLLER_SECONDS, say)
    if found is not None and found.restarts > restarts:
        say("Slurm has requeued the job by itself, as it does after a preemption")
        return code
    if found is None or not found.is_running:
        say(f"not requeued: the job is {found.state if found else 'unknown to Slurm'}")
        return code
    say(f"requeue {restarts + 1} of {job.requeues}" + (f", without {', '.join(missing)}" if missing else ""))
    refused = client.requeue(number, missing)
    if refused:
        say(f"Slurm does not requeue the job: {refused}; submit it again to go on")
    return code


def _failed_stop(verdict: Verdict) -> bool:
    """Return True for a failure after the ranks were told to stop: time was up, and they could not save, say.

    Nothing of the run itself is known to be wrong: it can go on from its newest checkpoint.
    """
    return verdict.stopping and verdict.code == EXIT_FAILURE


def _start_before_failed_to_stop(job: JobSpec, number: str, restarts: int) -> bool:
    """Return True if the newest attempt of an earlier start failed after it was told to stop.

    Once more would be no accident, and nothing that is trained would ever be kept.
    """
    try:
        records = [json.loads(line) for line in (job.folder / ATTEMPTS_FILE).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    this = (number, restarts)
    before = [one for one in records if "ended" in one and (one["job"], one["attempt"] // RESTARTS_PER_START) != this]
    return bool(before) and before[-1]["failed_stop"]


def main(arguments: list[str]) -> int:
    """Run the conductor of the job in a folder; return the exit code."""
    logs.configure()
    try:
        with Signals() as signals:
            return conduct(spec.read(Path(arguments[0])), signals)
    except PalimpsestError as error:
        print(f"palimpsest launch: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE if isinstance(error, NotOurs) else error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
