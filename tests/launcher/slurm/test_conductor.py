"""The conductor without Slurm: what it plans, what its ranks are told, and when a job is requeued."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EnvironmentProblem
from engine.run_folder import RunFolder, Start
from launcher.attempts import Ending
from launcher.environment import rank_environment
from launcher.signals import Signals
from launcher.slurm import client, conductor, wire
from launcher.slurm.agents import Agents, Node
from launcher.slurm.client import Allocated
from launcher.slurm.conductor import JobNodes, NotOurs
from launcher.slurm.fitness import Fitness
from launcher.slurm.remote import AgentRanks, Meeting
from launcher.slurm.site import Site
from launcher.verdict import Verdict
from tests.launcher.slurm.specs import example, run

SAVED, DONE, FAILED = Verdict(85, "saved at step 6"), Verdict(0, "done at step 9"), Verdict(1, "failed: bad shard")
# Told to stop, and then: a save that fails, a node that is lost meanwhile, a mistake that a later start has as well.
NOT_SAVED = Verdict(1, "failed at step 6: disk full", stopping=True)
LOST = Verdict(1, "failed: node n2 is lost", lost=frozenset((1,)), stopping=True)
USAGE = Verdict(2, "failed: a key is wrong", stopping=True)
RUNNING = Allocated("RUNNING", 0, "n1")


class Line:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> bool:
        self.sent.append(message)
        return True


class FewAgents(Agents):
    """Agents without connections."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._server.close()
        for number, name in enumerate(names):
            self._nodes[name] = Node(name, number, "10.0.0.1" if number == 0 else "", Line())  # type: ignore[arg-type]


class Fit(Fitness):
    """Checks that every live node passes."""

    def check(self, nodes: Any, needs: Any) -> list[str]:
        return [node.name for node in nodes]


def nodes(tmp_path: Path, *names: str, **changes: Any) -> JobNodes:
    """Return the nodes of a job with two ranks on each."""
    (tmp_path / "job").mkdir(exist_ok=True)
    given = {
        "min_nodes": 1,
        "ranks_per_node": 2,
        "gpus_per_node": 0,
        "run_folder": tmp_path,
        "folder": tmp_path / "job",
    }
    job = example(**given | changes)
    agents = FewAgents(*names)
    return JobNodes(run(), job, "17", 0, agents, job.overrides, Start("17", 0), Fit(agents, lambda words: None))


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "allocated", lambda number: RUNNING)


def test_attempts_are_planned_on_whole_nodes_and_numbered_on(tmp_path: Path) -> None:
    made = nodes(tmp_path, "n1", "n2", "n3", "n4")
    assert (made.plan() or "").startswith("8 ranks (")
    owned = RunFolder(tmp_path, made.start)
    made.ranks(owned)
    # Rank 3 was on n2: the next attempt leaves that node out, and the batch then takes two of the other three.
    words = made.next(Verdict(1, "failed: rank 3 hangs", lost=frozenset((3,))))
    assert words is not None
    assert words.startswith("4 ranks (")
    assert words.endswith(" on n1, n3; not used: n2, n4")
    assert made.start == Start("17", 1)


def test_every_attempt_is_noted(tmp_path: Path) -> None:
    made = nodes(tmp_path, "n1", "n2")
    made.plan()
    made.ranks(RunFolder(tmp_path, made.start))
    made.ended(FAILED)
    began, ended = [json.loads(line) for line in (tmp_path / "job" / "attempts.jsonl").read_text().splitlines()]
    assert (began["attempt"], began["nodes"], began["ranks_per_node"]) == (0, ["n1", "n2"], 2)
    assert (ended["attempt"], ended["code"], ended["words"]) == (0, 1, "failed: bad shard")


def test_no_world_is_left(tmp_path: Path) -> None:
    assert nodes(tmp_path, "n1", min_nodes=2).plan() is None
    assert nodes(tmp_path).plan() is None


@pytest.mark.parametrize("found", [None, Allocated("RUNNING", 1, "n9"), Allocated("CANCELLED", 0, "n1")])
def test_a_job_that_is_another_start_s_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Allocated | None
) -> None:
    monkeypatch.setattr(client, "allocated", lambda number: found)
    with pytest.raises(NotOurs, match="job 17 is not this start's any more"):
        nodes(tmp_path, "n1").plan()


def step_of(made: JobNodes, tmp_path: Path, port: int = 15123) -> tuple[list[str], dict[str, str]]:
    made.plan()
    ranks = made.ranks(RunFolder(tmp_path, made.start))
    assert isinstance(ranks, AgentRanks)
    return ranks.command(Meeting(ranks.meeting_host, port))


def test_ranks_find_their_place_in_what_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "7")  # left over in the shell from which the job was submitted
    monkeypatch.setenv(wire.TOKEN, "secret")
    command, environment = step_of(nodes(tmp_path, "n1", "n2"), tmp_path)
    assert "secret" not in json.dumps([command, environment])
    # As rank.sh does it for the last of four.
    environment |= {"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1"}
    found = rank_environment(environment)
    assert (found.global_rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert (found.node_rank, found.num_nodes, found.job, found.attempt) == (1, 2, "17", 0)
    assert (found.master_addr, found.master_port, found.launcher) == ("n1", 15123, "slurm")
    assert "parallel.data=4" in command


def test_the_first_node_s_address_follows_the_site(tmp_path: Path) -> None:
    by_suffix = Site.model_validate({"source": "x", "network": {"suffix": "i"}})
    assert step_of(nodes(tmp_path, "n1", "n2", site=by_suffix), tmp_path)[1]["MASTER_ADDR"] == "n1i"
    network = {"interface": "hsn0", "address": "interface"}
    by_interface = Site.model_validate({"source": "x", "network": network})
    assert step_of(nodes(tmp_path, "n1", "n2", site=by_interface), tmp_path)[1]["MASTER_ADDR"] == "10.0.0.1"
    made = nodes(tmp_path, "n1", site=by_interface)
    made.agents.all()[0].address = ""
    with pytest.raises(EnvironmentProblem, match="node n1 has no interface hsn0"):
        step_of(made, tmp_path)


def test_overrides_with_credentials_are_not_on_the_command_line(tmp_path: Path) -> None:
    made = nodes(tmp_path, "n1", overrides=(), hides_overrides=True)
    made.asked = ("tokenizer=s3://user:s3cr3t@bucket/t",)
    command, environment = step_of(made, tmp_path)
    assert "s3cr3t" not in " ".join(command)
    assert json.loads(environment["PALIMPSEST_OVERRIDES"]) == [*made.asked, "parallel.data=2"]


@pytest.mark.parametrize(
    ("ending", "restarts", "arrived", "found", "requeued", "last"),
    [
        (Ending(DONE, ""), 0, [], RUNNING, False, "done at step 9"),
        (Ending(FAILED, "not restarted"), 0, [], RUNNING, False, "not restarted"),
        (Ending(SAVED, ""), 0, [signal.SIGUSR1], RUNNING, True, "requeue 1 of 2"),
        (Ending(SAVED, ""), 2, [signal.SIGUSR1], Allocated("RUNNING", 2, "n1"), False, "all 2 requeues are used up"),
        (Ending(SAVED, ""), 0, [signal.SIGINT], RUNNING, False, "cancelled with `palimpsest job cancel`"),
        (Ending(SAVED, ""), 0, [signal.SIGTERM], Allocated("CANCELLED", 0, "n1"), False, "the job is CANCELLED"),
        (Ending(SAVED, ""), 0, [signal.SIGTERM], Allocated("PENDING", 1, ""), False, "has requeued the job by itself"),
        (Ending(NOT_SAVED, "asked to stop"), 0, [signal.SIGUSR1], RUNNING, True, "requeue 1 of 2"),
        (Ending(LOST, "asked to stop"), 0, [signal.SIGUSR1], RUNNING, True, "requeue 1 of 2"),
        (Ending(USAGE, "asked to stop"), 0, [signal.SIGUSR1], RUNNING, False, "asked to stop"),
        (
            Ending(NOT_SAVED, "asked to stop"),
            0,
            [signal.SIGINT],
            RUNNING,
            False,
            "cancelled with `palimpsest job cancel`",
        ),
        (Ending(NOT_SAVED, ""), 0, [signal.SIGTERM], Allocated("CANCELLED", 0, "n1"), False, "the job is CANCELLED"),
        (
            Ending(NOT_SAVED, ""),
            2,
            [signal.SIGUSR1],
            Allocated("RUNNING", 2, "n1"),
            False,
            "all 2 requeues are used up",
        ),
        (Ending(FAILED, "no world", no_world=True), 0, [], RUNNING, True, "requeue 1 of 2, without n2"),
        (Ending(FAILED, "no world", no_world=True), 2, [], RUNNING, False, "all 2 requeues are used up"),
    ],
)
def test_a_job_is_requeued_only_where_that_is_due(
    ending: Ending,
    restarts: int,
    arrived: list[signal.Signals],
    found: Allocated,
    requeued: bool,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(client, "allocated", lambda number: found)
    monkeypatch.setattr(client, "requeue", lambda number, exclude: asked.append((number, exclude)) or "")
    missing = ["n2"] if ending.no_world else []
    code = conductor._conclude(example(requeues=2), "17", restarts, ending, missing, Signals(arrived))
    assert code == ending.verdict.code
    assert asked == ([("17", missing)] if requeued else [])
    assert last in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("before", "requeued"), [([NOT_SAVED], False), ([SAVED], True), ([NOT_SAVED, SAVED], True), ([], True)]
)
def test_a_job_that_fails_to_stop_twice_in_a_row_is_not_requeued(
    before: list[Verdict], requeued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(client, "requeue", lambda number, exclude: asked.append(number) or "")
    made = nodes(tmp_path, "n1", "n2")
    for number, verdict in enumerate([*before, NOT_SAVED]):
        monkeypatch.setattr(client, "allocated", lambda _, number=number: Allocated("RUNNING", number, "n1"))
        made.start, made.restarts = Start("17", number * 1000), number
        made.plan()
        made.ranks(RunFolder(tmp_path, made.start))
        made.ended(verdict)
    conductor._conclude(made.job, "17", len(before), Ending(NOT_SAVED, ""), [], Signals())
    assert asked == (["17"] if requeued else [])


def test_a_site_without_requeues(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(client, "requeue", lambda number, exclude: pytest.fail("requeued"))
    job = example(requeues=2, site=Site(source="x", requeue=False))
    conductor._conclude(job, "17", 0, Ending(SAVED, ""), [], Signals())
    assert "this site requeues no jobs" in capfd.readouterr().out
