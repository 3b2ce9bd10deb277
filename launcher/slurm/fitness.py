"""Preflight of the nodes of a job by their agents, before each attempt: which nodes are fit, and what is told.

A node that fails a check is left out. Where all nodes fail, the fault is not theirs (a full disk that all share), and
the job ends with the first finding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine import logs
from engine.config.schema.run import RunConfig
from engine.errors import EnvironmentProblem
from launcher.node_checks import Finding, Needs
from launcher.preflight import NodeReport, compare_nodes
from launcher.slurm import wire
from launcher.slurm.agents import Agents, Node

CHECK_SECONDS = 60.0
"""Seconds that a node has for its checks; one that takes longer is not judged by them."""


def to_json(needs: Needs) -> wire.Message:
    """Return demands as a message."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(needs).items()}


def from_json(tree: wire.Message) -> Needs:
    """Return the demands in a message."""
    paths = {key: Path(tree[key]) for key in ("folder", "shared") if tree[key] is not None}
    return Needs(**{**tree, **paths})


@dataclass
class Fitness:
    """Checks of the nodes of one job, and what was told of them already."""

    agents: Agents
    tell: Callable[[str], None]
    unfit: dict[str, str] = field(default_factory=dict)
    """Nodes that failed their last check, and in what."""
    _told: set[str] = field(default_factory=set)

    def check(self, nodes: Sequence[Node], needs: Needs) -> list[str]:
        """Have nodes checked, tell what is wrong with them, and return the names of those that are fit.

        Raises:
            EnvironmentProblem: none is.
        """
        for node in nodes:
            node.checked = None
            node.line.send({"do": "check", "needs": to_json(needs)})
        deadline = time.monotonic() + CHECK_SECONDS
        with logs.phase("checking the nodes"):
            while any(node.checked is None and not node.lost for node in nodes) and time.monotonic() < deadline:
                self.agents.live()
                self.agents.wait_for_change(0.1)
        reports = {node.name: NodeReport.from_json(node.checked["report"]) for node in nodes if node.checked}
        self.unfit = {}
        for name, report in reports.items():
            for finding in report.findings:
                if finding.level == "failed":
                    self.unfit.setdefault(name, f"{finding.check}: {finding.text}")
                self._say(name, finding)
        clocks = {node.name: node.checked["clock"] - node.checked_at for node in nodes if node.checked}
        if len(reports) > 1:
            for finding in compare_nodes(list(reports.values()), clocks):
                self._say("nodes differ", finding)
        fit = [node.name for node in nodes if node.name not in self.unfit and not node.lost]
        if nodes and not fit and self.unfit:
            name, why = next(iter(self.unfit.items()))
            remedies = [finding.remedy for finding in reports[name].findings if finding.level == "failed"]
            raise EnvironmentProblem(f"no node is fit for the run: {name}: {why}", "", remedies[0])
        return fit

    def _say(self, where: str, finding: Finding) -> None:
        """Tell a finding that is not well, once."""
        words = f"preflight, {where}: {finding.check}: {finding.text}"
        if finding.level != "ok" and words not in self._told:
            self._told.add(words)
            self.tell(words + (f" (to do: {finding.remedy})" if finding.remedy else ""))


def without_memory(needs: Needs) -> Needs:
    """Return demands for a restart: the node's memory still holds the checkpoints of the attempt before."""
    return replace(needs, host_bytes=0, shared_bytes=0)


def plain_needs(run: RunConfig, ranks_per_node: int, gpus_per_node: int, num_nodes: int, job: str) -> Needs:
    """Return what any run asks of a node, before its plan is known."""
    return Needs(folder=run.folder, ranks=ranks_per_node, gpus=gpus_per_node or None, num_nodes=num_nodes, job=job)
