"""The conductor of a job, on its batch host: what the batch script becomes. Never imports torch.

It takes the run folder, waits for the agents, and makes attempt after attempt on the nodes that live. Attempts of one
start of the job are numbered on from the starts before it x 1000 (`launcher.slurm.starts`); the job's name stays. What
follows a start is decided in `launcher.slurm.follow_up`. Before each attempt Slurm is asked that the job is still this
start's: where it was requeued behind our back, a newer start owns the run folder.
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
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, EnvironmentProblem, PalimpsestError
from engine.plan.shrink import UNKNOWN, world_for
from engine.run_folder import RunFolder, Start
from launcher.attempts import run_attempts
from launcher.devices import accelerator
from launcher.environment import hidden_overrides
from launcher.left_over import left_over
from launcher.needs import needs_of
from launcher.restarts import Restarts
from launcher.signals import Signals
from launcher.slurm import client, render, spec, starts, wire
from launcher.slurm.agent import JOB_FOLDER, beats_folder
from launcher.slurm.agents import Agents, Node
from launcher.slurm.fitness import Fitness, plain_needs, without_memory
from launcher.slurm.follow_up import CONTROLLER_SECONDS, conclude, end_chain, failed_stop, nothing_to_do, read_run, say
from launcher.slurm.life import SignOfLife
from launcher.slurm.placement import Placement, place
from launcher.slurm.remote import AgentRanks, Meeting
from launcher.slurm.spec import AGENTS_LOG, ATTEMPTS_FILE, JobSpec
from launcher.slurm.starts import JobStart
from launcher.slurm.step import Step
from launcher.variables import ATTEMPT, JOB, LAUNCHER, OVERRIDES, RUN_FOLDER
from launcher.verdict import Verdict

AGENTS_SECONDS = 180.0
"""Seconds that the agents of all nodes have to come; after that the job goes on with those that are there."""


class NotOurs(EnvironmentProblem):
    """The job was requeued or ended while this start of it was cut off; another start owns the run."""


@dataclass
class JobNodes:
    """The nodes of the job, as a starter of attempts (`launcher.attempts.Starter`)."""

    run: RunConfig
    job: JobSpec
    this: JobStart
    """This start of the job."""
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
            ControllerAway: Slurm's controller gives no answer.
        """
        number = self.this.number
        found = client.patiently(lambda: client.allocated(number), CONTROLLER_SECONDS, say)
        if found is None or not found.is_running or found.restarts != self.this.requeues:
            state = "unknown to Slurm" if found is None else f"{found.state}, requeued {found.restarts} times"
            raise NotOurs(f"job {number} is not this start's any more: it is {state}")
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
                    "step": verdict.step, "failed_stop": failed_stop(verdict)})  # fmt: skip

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
        record["job"] = self.this.number
        try:
            with (self.job.folder / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logs.logger(__name__).warning("%s cannot be written: %s", ATTEMPTS_FILE, error)


def conduct(job: JobSpec, this: JobStart, signals: Signals) -> int:
    """Run the attempts of this start of the job; return the exit code of the batch script."""
    asked = tuple(hidden_overrides(os.environ)) if job.hides_overrides else job.overrides
    if job.hides_overrides and not asked:
        raise EnvironmentProblem(
            f"{OVERRIDES} is not in the environment of the job, but its overrides hold credentials",
            "a job that inherits the environment of palimpsest launch",
            "submit with --export=ALL (SBATCH_EXPORT unset)",
        )
    run = read_run(job, asked)
    if why := nothing_to_do(job, this, run):
        end_chain(job, this, why)
        return EXIT_DONE
    num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    which = f"start {this.index + 1}" if job.chain is None else f"link {this.index + 1} of {job.chain}"
    say(f"job {this.number}, {which}, {num_nodes} nodes: waiting for an agent on each")
    with Agents() as agents, SignOfLife(job.folder, lambda: agents.num_lost, lambda: _is_ours(this)):
        step = _start_agents(job, this, agents, num_nodes)
        try:
            # Nobody waits for agents that will never come.
            agents.wait(num_nodes, AGENTS_SECONDS, lambda: step.poll() is not None)
            start = Start(this.job, this.first_attempt)
            fitness = Fitness(agents, say)
            nodes = JobNodes(run, job, this, agents, asked, start, fitness)
            ending = run_attempts(run, nodes, Restarts(job.restarts), say, signals)
            missing = [node.name for node in agents.all() if node.lost or node.name in fitness.unfit]
        finally:
            agents.__exit__()
            _stop(step)
    # SIGINT and not SIGTERM, which is the cluster's: after that the run is to go on.
    return conclude(job, this, ending, missing, signal.SIGINT in signals.arrived, asked)


def _is_ours(this: JobStart) -> bool:
    """Return True if Slurm answers that the job is still this start's."""
    try:
        found = client.allocated(this.number)
    except EnvironmentProblem:
        return False
    return found is not None and found.is_running and found.restarts == this.requeues


def _start_agents(job: JobSpec, this: JobStart, agents: Agents, num_nodes: int) -> Step:
    environment = dict(os.environ) | {
        wire.TOKEN: agents.token,
        wire.CONDUCTOR: f"{socket.gethostname()}:{agents.port}",
        JOB_FOLDER: str(job.folder),
        starts.VARIABLE: starts.to_text(this),
    }
    return Step(render.agents_step(job, num_nodes), environment, job.folder / AGENTS_LOG)


def _stop(step: Step) -> None:
    """Wait for the agents, which were told to leave; a step on a lost node is left to Slurm."""
    step.wait(wire.BEAT_SECONDS * 6)
    step.kill()


def main(arguments: list[str]) -> int:
    """Run the conductor of the job in a folder; return the exit code.

    `arguments` are the folder and, in a job that its predecessor has submitted, `starts.successor_arguments`.
    """
    logs.configure()
    folder, *successor_of = arguments
    try:
        job = spec.read(Path(folder))
        this = starts.job_start(job, os.environ, successor_of)
        with Signals() as signals:
            return _conduct_or_end(job, this, signals)
    except PalimpsestError as error:
        print(f"palimpsest launch: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE if isinstance(error, NotOurs) else error.exit_code


def _conduct_or_end(job: JobSpec, this: JobStart, signals: Signals) -> int:
    """Run this start; where it cannot, links that come later cannot either, unless Slurm was the reason."""
    try:
        return conduct(job, this, signals)
    except (NotOurs, client.ControllerAway):
        raise
    except PalimpsestError as error:
        end_chain(job, this, error.wrong)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
