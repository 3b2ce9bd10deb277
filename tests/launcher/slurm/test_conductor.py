"""The conductor without Slurm: what it plans, and what its ranks are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EnvironmentProblem
from engine.run_folder import RunFolder, Start
from launcher.environment import rank_environment
from launcher.slurm import client, wire
from launcher.slurm.agents import Agents, Node
from launcher.slurm.client import Allocated
from launcher.slurm.conductor import JobNodes, NotOurs
from launcher.slurm.fitness import Fitness
from launcher.slurm.remote import AgentRanks, Meeting
from launcher.slurm.site import Site
from launcher.slurm.starts import JobStart
from launcher.verdict import Verdict
from tests.launcher.slurm.specs import example, run

FAILED = Verdict(1, "failed: bad shard")
RUNNING = Allocated("RUNNING", 0, "n1")
FIRST = JobStart("17", 0, "17", 0)


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
    return JobNodes(run(), job, FIRST, agents, job.overrides, Start("17", 0), Fit(agents, lambda words: None))


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
