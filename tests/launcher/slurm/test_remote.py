"""Conductor and agents over real connections, in one process: what ranks on other nodes look like, and their loss.

The ranks are shells that sleep, started where srun would start them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.heartbeat import Heartbeat
from engine.run_folder import RunFolder, Start
from launcher.slurm import agent, life, render, wire
from launcher.slurm.agents import Agents
from launcher.slurm.client import Allocated
from launcher.slurm.life import CERTAIN_SECONDS, Silence
from launcher.slurm.remote import AgentRanks, Meeting
from launcher.slurm.site import Site
from launcher.slurm.starts import JobStart
from launcher.verdict import End
from tests.launcher.slurm.specs import RESUBMIT, example

WAIT_SECONDS = 60.0


def wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not until():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


@dataclass
class Cluster:
    """Agents of nodes n0, n1, ... that are threads of this process."""

    agents: Agents
    owned: RunFolder
    folder: Path
    lines: list[wire.Line] = field(default_factory=list)
    served: list[agent.Agent] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def join(self, number: int, token: str | None = None) -> agent.Agent:
        connection = socket.create_connection(("127.0.0.1", self.agents.port))
        line = wire.Line(connection)
        hello = {"token": token or self.agents.token, "node": f"n{number}", "number": number, "address": ""}
        line.send(hello)
        one = agent.Agent(line, self.owned.start.job)
        thread = threading.Thread(target=one.serve, daemon=True)
        thread.start()
        self.lines.append(line)
        self.served.append(one)
        self.threads.append(thread)
        return one

    def ranks(self, *scripts: str) -> AgentRanks:
        """Two nodes with one rank each, which run these scripts under `rank.sh`."""
        script = self.folder / "rank.sh"
        script.write_text(render.rank_script(example()))
        start = self.owned.start
        lines = [
            f"SLURM_PROCID={rank} SLURM_LOCALID=0 SLURM_NODEID={rank} bash {script} bash -c '{code}' &"
            for rank, code in enumerate(scripts)
        ]
        environment = os.environ | {
            "PALIMPSEST_JOB": start.job,
            "PALIMPSEST_ATTEMPT": str(start.attempt),
            "PALIMPSEST_HEARTBEATS": str(agent.beats_folder(start.job, start.attempt)),
        }
        (self.folder / "step.sh").write_text("\n".join([*lines, "wait"]))
        command = ["bash", str(self.folder / "step.sh")]
        nodes = self.agents.wait(len(scripts), WAIT_SECONDS, lambda: False)

        def start_step(meeting: Meeting) -> tuple[list[str], dict[str, str]]:
            assert meeting.host == "n0"
            assert meeting.port > 0
            return command, environment

        return AgentRanks(nodes, 1, self.owned, self.agents, start_step, "n0")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # Both nodes are this machine: each attempt has one folder of beats, which both agents would make anew.
    beats = tmp_path / "beats"
    monkeypatch.setattr(agent, "beats_folder", lambda job, attempt: beats)
    monkeypatch.setattr(agent.Agent, "_prepare", _prepare)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    owned = RunFolder(tmp_path / "run", Start(f"test-{os.getpid()}", 1000))
    beats.mkdir()
    with Agents() as agents:
        made = Cluster(agents, owned, tmp_path)
        yield made
    for thread in made.threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "an agent does not leave"


def _prepare(self: agent.Agent, attempt: agent.Attempt) -> None:
    self.attempt = attempt
    self.line.send({"say": "ready", "attempt": attempt.number, "port": 12345})


def test_ends_of_ranks_come_from_their_agents(cluster: Cluster) -> None:
    cluster.join(0)
    cluster.join(1)
    ranks = cluster.ranks("exit 3", "exit 0")
    ranks.start()
    wait(lambda: not ranks.view().alive)
    view = ranks.view()
    assert view.ends == (End("rank-0", 3), End("rank-1", 0), End("launcher", 0))
    assert view.all_ended
    assert ranks.end() == (view.ends, None)


def test_signals_beats_and_a_kill(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.join(0)
    cluster.join(1)
    save = 'trap "exit 85" USR1; while :; do sleep 0.05; done'
    ranks = cluster.ranks(save, "sleep 600")
    ranks.start()
    wait(lambda: ranks.view().ranks == {0, 1})
    monkeypatch.setattr(ranks._step, "_said", lambda: pytest.fail("the step has begun, and its log is read"))
    Heartbeat(agent.beats_folder("", 0), 1).beat(7, "load")
    wait(lambda: (beat := ranks.view().beats[1]) is not None and beat.step == 7)
    assert ranks.view().beats[0] is None
    ranks.send(signal.SIGUSR1)
    wait(lambda: End("rank-0", 85) in ranks.view().ends)
    ends, _ = ranks.end()
    assert End("rank-1", -signal.SIGKILL) in ends or End("rank-1", -signal.SIGUSR1) in ends
    assert not [one for one in cluster.served if one.attempt and one.attempt.processes()]


def test_a_node_whose_agent_is_gone_is_lost_with_its_ranks(cluster: Cluster) -> None:
    cluster.join(0)
    cluster.join(1)
    ranks = cluster.ranks("sleep 600", "sleep 600")
    ranks.start()
    wait(lambda: ranks.view().ranks == {0, 1})
    cluster.lines[1].close()
    wait(lambda: ranks.view().lost is not None)
    lost = ranks.view().lost
    assert lost is not None
    assert (lost.ranks, lost.cause) == ({1}, "lost n1")
    assert lost.how == "node n1 is lost: its agent's connection has ended (ranks 1)"
    assert [node.name for node in cluster.agents.live()] == ["n0"]
    ranks.end()


def test_an_agent_whose_conductor_is_silent_ends_its_ranks(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SILENT_SECONDS", 1.0)
    own = socket.create_server(("127.0.0.1", 0))
    line = wire.Line(socket.create_connection(own.getsockname()))
    silent, _ = own.accept()
    alone = agent.Agent(line, "silent")
    alone.attempt = agent.Attempt("silent", 0, range(1))
    environment = os.environ | {render.MARK: "silent.0", "RANK": "0"}
    rank = subprocess.Popen(["sleep", "600"], env=environment)
    alone.serve()
    assert rank.wait(WAIT_SECONDS) == -signal.SIGKILL
    assert not alone.dismissed, "it looks for the conductor, and for Slurm"
    silent.close()
    own.close()


def test_goodbye_is_told_from_silence(cluster: Cluster) -> None:
    one = cluster.join(0)
    wait(lambda: cluster.agents.live())
    cluster.agents.__exit__()
    wait(lambda: one.dismissed)


def test_strangers_and_lost_nodes_are_turned_away(cluster: Cluster) -> None:
    stranger = cluster.join(0, token="guessed")
    cluster.threads[0].join(WAIT_SECONDS)
    assert not cluster.agents.all()
    assert not stranger.dismissed
    cluster.join(1)
    wait(lambda: [node.name for node in cluster.agents.live()] == ["n1"])
    cluster.lines[1].close()
    wait(lambda: not cluster.agents.live())
    again = cluster.join(1)
    wait(lambda: again.dismissed)
    assert not cluster.agents.live(), "its ranks were taken for lost"


class Asked(list[str]):
    """Commands that an agent gives Slurm, once the conductor is silent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in ("requeue", "cancel"):
            monkeypatch.setattr(agent.client, name, lambda number, name=name: self.append(f"{name} {number}") or "")

        def submit(command: Sequence[str], script: Path, arguments: Sequence[str] = (), ask: object = None) -> str:
            self.append(" ".join(("submit", *command[1:], *arguments)))
            return "23"

        monkeypatch.setattr(agent.client, "submit", submit)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def start_of(index: int, number: str = "17") -> JobStart:
    return JobStart("17", index, number, index if number == "17" else 0)


def silent(folder: Path) -> Silence:
    """Return the silence of a conductor that is lost for certain."""
    return Silence(folder, time.monotonic() - CERTAIN_SECONDS)


def test_a_job_whose_controller_says_it_is_another_start_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, asked: Asked, tmp_path: Path
) -> None:
    for found, expected in (
        (Allocated("RUNNING", 0, "n1"), ["requeue 17"]),
        (Allocated("RUNNING", 1, "n1"), []),  # requeued meanwhile
        (Allocated("COMPLETING", 0, "n1"), []),
        (None, []),
    ):
        asked.clear()
        monkeypatch.setattr(agent.client, "allocated", lambda number, found=found: found)
        assert agent._leave(example(requeues=2), start_of(0), None, silent(tmp_path))
        assert asked == expected


@pytest.mark.parametrize(
    ("changes", "start", "words"),
    [
        ({"requeues": 2}, start_of(2), "all 2 requeues are used up"),
        ({"requeues": 2, "site": RESUBMIT}, start_of(2, "31"), "all 2 requeues are used up"),
        ({"chain": 3, "requeues": 0}, start_of(2, "17_3"), "all 3 links of the chain are used up"),
        ({"requeues": 2, "site": Site(source="x", requeue="none")}, start_of(0), "this site requeues no jobs"),
    ],
)
def test_a_lost_batch_host_does_not_start_a_job_for_ever(
    changes: dict[str, Any],
    start: JobStart,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    asked: Asked,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(agent.client, "allocated", lambda number: Allocated("RUNNING", start.requeues, "n1"))
    assert agent._leave(example(run_folder=tmp_path, folder=tmp_path, **changes), start, None, silent(tmp_path))
    assert asked == [f"cancel {start.number}"]
    said = outcome.read(tmp_path)
    assert said is not None
    assert (said.job, said.attempt) == ("17", start.index * 1000)
    assert said.error.startswith("the batch host n1 was lost, and ")
    assert words in said.error


def test_a_link_whose_batch_host_is_lost_makes_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch, asked: Asked, tmp_path: Path
) -> None:
    monkeypatch.setattr(agent.client, "allocated", lambda number: Allocated("RUNNING", 0, "n1"))
    assert agent._leave(example(chain=3, requeues=0, run_folder=tmp_path), start_of(1, "17_2"), None, silent(tmp_path))
    assert asked == ["cancel 17_2"], "this link alone"
    assert outcome.read(tmp_path) is None, "the run goes on"


def test_of_all_agents_one_submits_the_successor(monkeypatch: pytest.MonkeyPatch, asked: Asked, tmp_path: Path) -> None:
    """Where Slurm requeues nothing: both find the job running, and both cancel it."""
    monkeypatch.setattr(agent.client, "allocated", lambda number: Allocated("RUNNING", 0, "n1"))
    job = example(site=RESUBMIT, requeues=2, run_folder=tmp_path, folder=tmp_path)
    for _ in range(2):
        assert agent._leave(job, start_of(1, "21"), None, silent(tmp_path))
    assert asked == ["submit --dependency=afterany:21 --exclude=n1 17 2", "cancel 21", "cancel 21"]
    assert (tmp_path / "number").read_text() == "23\n"
    assert outcome.read(tmp_path) is None


def test_a_node_that_was_cut_off_leaves_a_job_alone_whose_conductor_lives(
    monkeypatch: pytest.MonkeyPatch, asked: Asked, tmp_path: Path
) -> None:
    """It reaches Slurm, for which the job is running, before it reaches the conductor."""
    monkeypatch.setattr(agent.client, "allocated", lambda number: Allocated("RUNNING", 0, "n1"))
    monkeypatch.setattr(life, "BEAT_SECONDS", 0.05)
    job, silence = example(requeues=2), Silence(tmp_path)
    assert not agent._leave(job, start_of(0), None, silence), "there may yet be a sign of life"
    with life.SignOfLife(tmp_path, lambda: 1, lambda: True):
        wait(lambda: silence.is_broken)
    silence.since -= CERTAIN_SECONDS
    assert agent._leave(job, start_of(0), None, silence)
    assert asked == []


@pytest.mark.parametrize(("num_lost", "is_ours"), [(0, True), (1, False)])
def test_a_conductor_gives_no_sign_where_nothing_is_lost_or_slurm_does_not_answer(
    num_lost: int, is_ours: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(life, "BEAT_SECONDS", 0.01)
    with life.SignOfLife(tmp_path, lambda: looked.append(0) or num_lost, lambda: is_ours):
        wait(lambda: len(looked) > 5)
    assert not (tmp_path / life.FILE).exists()


def test_the_address_of_an_interface() -> None:
    assert agent.address_of("lo") == "127.0.0.1"
    assert agent.address_of("no-such-net") == ""


def test_stacks_come_from_the_nodes_of_the_ranks(cluster: Cluster) -> None:
    cluster.join(0)
    cluster.join(1)
    ranks = cluster.ranks("sleep 600", "sleep 600")
    ranks.start()
    wait(lambda: ranks.view().ranks == {0, 1})
    seen = ranks.take_stacks(ranks.view(), {0: 1.0, 1: 7.5})
    # Both agents see both ranks here, which are processes of one machine; each is there with what is known of it.
    assert {(one.global_rank, one.silent_seconds) for one in seen} == {(0, 1.0), (1, 7.5)}
    assert all(one.refused and not one.stack for one in seen), "a sleeping shell has no Python stack"
    ranks.end()
