"""Preflight of the nodes of a job: bad nodes are left out and told once, a fault of all ends the job."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import EnvironmentProblem
from launcher.node_checks import Finding, Needs
from launcher.preflight import NodeReport
from launcher.slurm import fitness, wire
from launcher.slurm.agents import Agents, Node
from launcher.slurm.fitness import Fitness

FULL = Finding("disk", "failed", "0.0 GiB free", "make room")


def agent(agents: Agents, number: int, *findings: Finding, torch: str = "2.9", clock: float = 0.0) -> None:
    """An agent that answers a check with these findings."""
    line = wire.Line(socket.create_connection(("127.0.0.1", agents.port)))
    line.send({"token": agents.token, "node": f"n{number}", "number": number})

    def answer() -> None:
        for message in line.messages():
            if message and message.get("do") == "check":
                assert fitness.from_json(message["needs"]) == NEEDS
                report = NodeReport(f"n{number}", findings, {"torch": torch})
                line.send({"say": "checked", "report": report.as_json(), "clock": time.time() + clock})

    threading.Thread(target=answer, daemon=True).start()


NEEDS = Needs(folder=Path("/runs/x"), disk_bytes=7, gpus=8)


def checked(agents: Agents, num_nodes: int) -> tuple[list[str], list[str], Fitness]:
    told: list[str] = []
    made = Fitness(agents, told.append)
    nodes: list[Node] = agents.wait(num_nodes, 60.0, lambda: False)
    return made.check(nodes, NEEDS), told, made


def test_a_bad_node_is_left_out_and_told_once() -> None:
    with Agents() as agents:
        agent(agents, 0, Finding("memory", "ok", "12 GiB"))
        agent(agents, 1, FULL, Finding("port", "failed", "12345: in use"))
        fit, told, made = checked(agents, 2)
        assert fit == ["n0"]
        assert made.unfit == {"n1": "disk: 0.0 GiB free"}
        assert told == ["preflight, n1: disk: 0.0 GiB free (to do: make room)", "preflight, n1: port: 12345: in use"]
        assert made.check(agents.live(), NEEDS) == ["n0"]
        assert len(told) == 2


def test_a_warning_leaves_nobody_out() -> None:
    with Agents() as agents:
        agent(agents, 0, Finding("stacks", "warning", "py-spy is not installed"))
        fit, told, _ = checked(agents, 1)
        assert (fit, told) == (["n0"], ["preflight, n0: stacks: py-spy is not installed"])


def test_what_all_nodes_lack_is_an_error_of_the_run() -> None:
    with Agents() as agents:
        agent(agents, 0, FULL)
        agent(agents, 1, FULL)
        with pytest.raises(EnvironmentProblem) as caught:
            checked(agents, 2)
        assert caught.value.wrong == "no node is fit for the run: n0: disk: 0.0 GiB free"
        assert caught.value.remedy == "make room"


def test_nodes_that_differ_are_told() -> None:
    with Agents() as agents:
        agent(agents, 0)
        agent(agents, 1, torch="2.8", clock=3600.0)
        fit, told, _ = checked(agents, 2)
        assert fit == ["n0", "n1"]
        assert any("2.8 on n1; 2.9 on n0" in words for words in told)
        assert any("clocks: n1 is 3600 s ahead of n0" in words for words in told)


def test_a_restart_asks_for_no_more_memory() -> None:
    needs = replace(NEEDS, host_bytes=5, shared_bytes=6)
    assert fitness.without_memory(needs) == NEEDS
