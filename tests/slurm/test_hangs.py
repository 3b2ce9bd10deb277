"""Ranks without a supervisor on two nodes: one that stands still, is killed or goes astray is named.

| fault | srun | mpirun | torchrun under srun | deepspeed |
| --- | --- | --- | --- | --- |
| frozen rank (SIGSTOP) | stand-in, real ranks | stand-in | stand-in | tests/chaos, by `launch` |
| rank that is in no collective | stand-in | | | |
| killed rank | stand-in, real ranks | | stand-in | tests/chaos, by `launch` |
| frozen node | stand-in | | | |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.outcome import Outcome
from tests.slurm.cluster import Cluster, MakeCluster
from tests.slurm.launchers import line, reason_to_skip

LIMITS = {"step_limit_seconds": 8.0, "step_limit_factor": 1.0, "start_limit_seconds": 25.0}

STEP = 60
"""Steps that are done before a fault: enough for the watchers to know the usual one."""


def spec(cluster: Cluster, **more: Any) -> Path:
    """Write the file of a stand-in's run; its folder is `run`."""
    path = cluster.folder / "spec.json"
    path.write_text(json.dumps({"folder": str(cluster.folder / "run"), "steps": 10**6, "launch": LIMITS} | more))
    return path


def ended(cluster: Cluster, launcher: str, **more: Any) -> tuple[Outcome, str]:
    """Run stand-ins until their job has failed; return the outcome, and what the script wrote."""
    job = cluster.sbatch(line(launcher, "tests.slurm.stand_in", spec(cluster, **more)), "--nodes=2", "--no-requeue")
    assert cluster.wait_job(job, timeout=300) == "FAILED", cluster.output(job)
    found = outcome.read(cluster.folder / "run")
    assert found is not None, cluster.output(job)
    assert found.job == str(job), found
    return found, cluster.output(job)


@pytest.mark.parametrize(
    "launcher", ["srun", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("mpirun", "torchrun"))]
)
def test_a_frozen_rank_is_named_with_its_stack(launcher: str, cluster: Cluster) -> None:
    if reason := reason_to_skip(launcher):
        pytest.skip(reason)
    found, text = ended(cluster, launcher, fault={"what": "freeze", "rank": 1, "step": STEP})
    assert (found.code, found.rank, found.step) == (1, 1, STEP), found
    assert found.error.startswith("rank 1 hangs: silent for "), text
    assert "in step 61 (forward and backward), its process is stopped (SIGSTOP), in strike (tests/slurm/" in found.error
    assert "rank 0 waits in all_reduce" in found.error
    stacks = (cluster.folder / f"run/logs/hang-{found.job}.0.txt").read_text()
    assert "rank 0: silent" in stacks
    assert "strike (tests/slurm/stand_in.py" in stacks


def test_a_rank_in_no_collective_is_named(cluster: Cluster) -> None:
    found, _ = ended(cluster, "srun", fault={"what": "spin", "rank": 0, "step": STEP})
    assert found.rank == 0
    assert "in spin (tests/slurm/stand_in.py" in found.error
    assert "rank 1 waits in all_reduce" in found.error


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.matrix)])
def test_a_killed_rank_is_named(launcher: str, cluster: Cluster) -> None:
    found, text = ended(cluster, launcher, fault={"what": "kill", "rank": 1, "step": STEP})
    assert (found.code, found.rank, found.step) == (1, 1, STEP)
    words = "rank 1 ended without a word in step 61 (forward and backward) on node2: it was killed, or it crashed"
    assert found.error.startswith(words)
    assert words in text, "on standard error, too"


def test_a_frozen_node_is_named_by_the_others(make_cluster: MakeCluster) -> None:
    """Slurm would notice after five minutes, as it does where nobody has changed its clocks."""
    cluster = make_cluster(2, slurmd_timeout=300)
    job = cluster.sbatch(line("srun", "tests.slurm.stand_in", spec(cluster)), "--nodes=2", "--no-requeue")
    progress = cluster.folder / "run" / f"progress-{job}-0"
    cluster.wait_for(lambda: (progress / "20-1").exists(), "no step is done")
    cluster.freeze("node2")
    cluster.wait_for(lambda: outcome.read(cluster.folder / "run"), "nobody has noticed")
    found = outcome.read(cluster.folder / "run")
    assert found is not None
    assert found.rank == 1
    assert found.error.startswith("no sign of life of rank 1, nor of a watcher there: a node is frozen"), found.error
    assert "rank 0 waits in all_reduce" in found.error


def test_ranks_that_end_by_themselves_leave_nothing(cluster: Cluster) -> None:
    job = cluster.sbatch(line("srun", "tests.slurm.stand_in", spec(cluster, steps=5)), "--nodes=2")
    assert cluster.wait_job(job) == "COMPLETED", cluster.output(job)
    found = outcome.read(cluster.folder / "run")
    assert found is not None
    assert found.code == 0
    assert cluster.run("ls", "/dev/shm", on="node1").stdout == ""
    assert "rank_watcher" not in cluster.run("ps", "-e", "-o", "args", on="node1").stdout
