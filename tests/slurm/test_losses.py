"""Real ranks on two nodes: every launcher gives bitwise the losses of one node, and names the rank that it loses.

One thread per rank everywhere, so that sums are taken in one order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.config.load import merge
from engine.train.metrics import read_metrics
from tests.distributed.runs import run_tree, write_corpus
from tests.slurm.cluster import Cluster, MakeCluster
from tests.slurm.hold import FOLDER, HOLD_AT
from tests.slurm.launchers import line, reason_to_skip

NUM_STEPS = 4
CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
matrix = pytest.mark.matrix
WriteRun = Callable[..., Path]


@pytest.fixture(scope="module")
def write_run(steady_cluster: Cluster) -> WriteRun:
    """Write a run file of a tiny model on two data ranks, on the shared disk."""
    write_corpus(steady_cluster.folder)
    return lambda **changes: _write(steady_cluster.folder, steady_cluster.folder, **changes)


def _write(corpus: Path, folder: Path, num_steps: int = NUM_STEPS, **changes: Any) -> Path:
    stage = run_tree(corpus, folder)["stages"][0] | {"duration": {"steps": num_steps}}
    ordinary = {
        "model": {"num_layers": 2, "hidden_size": 32},
        "parallel": {"zero_stage": 1},
        "stages": [stage],
        "evaluation": {"every_steps": None, "max_samples": 8},
        "checkpoint": {"every_steps": None},
        "launch": {"step_limit_seconds": 20.0, "step_limit_factor": 10.0, "start_limit_seconds": 240.0},
        "checks": False,
    }
    path = folder / "RUN.yaml"
    path.write_text(json.dumps(merge(run_tree(corpus, folder / "run"), ordinary | changes)), encoding="utf-8")
    return path


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def on_one_node(steady_cluster: Cluster, write_run: WriteRun) -> list[float]:
    folder = steady_cluster.folder / "one-node"
    command = ("palimpsest", "launch", write_run(), f"folder={folder}", "--processes", "2")
    steady_cluster.run(*command, on="node1", env=CPU, timeout=600)
    found = losses(folder)
    assert len(found) == NUM_STEPS
    return found


@pytest.mark.parametrize(
    "launcher",
    [
        "srun",
        pytest.param("pmix", marks=matrix),
        "mpirun",
        pytest.param("torchrun", marks=matrix),
        "deepspeed-pdsh",
        pytest.param("deepspeed-openmpi", marks=matrix),
        pytest.param("deepspeed-slurm", marks=matrix),
    ],
)
def test_two_nodes_train_bitwise_as_one(
    launcher: str, steady_cluster: Cluster, write_run: WriteRun, on_one_node: list[float]
) -> None:
    if reason := reason_to_skip(launcher):
        pytest.skip(reason)
    folder = steady_cluster.folder / launcher
    module = "tests.slurm.with_mpi" if launcher == "pmix" else "engine.cli"
    script = line(launcher, module, "train", write_run(), f"folder={folder}")
    job = steady_cluster.sbatch(script, "--nodes=2", "--exclusive", env=CPU)
    assert steady_cluster.wait_job(job, timeout=600) == "COMPLETED", steady_cluster.output(job)
    assert losses(folder) == on_one_node
    found = outcome.read(folder)
    assert found is not None
    assert (found.code, found.step) == (0, NUM_STEPS)
    if launcher == "pmix":
        assert "MPI rank 1 of 2" in steady_cluster.output(job)


@matrix
def test_restarts_that_one_agent_of_torchrun_counts_are_one_attempt(
    steady_cluster: Cluster, write_run: WriteRun, on_one_node: list[float]
) -> None:
    """A rank of each node is killed in turn: every agent counts one restart of two, but ranks meet as one attempt."""
    shared, folder = steady_cluster.folder / "restarts", steady_cluster.folder / "restarts/run"
    shared.mkdir()
    run = write_run(checkpoint={"every_steps": 1})
    script = line("torchrun", "tests.slurm.rank", run, f"folder={folder}").replace(" -m", " --max-restarts=2 -m", 1)
    job = steady_cluster.sbatch(script, "--nodes=2", "--exclusive", env=CPU | {FOLDER: str(shared), HOLD_AT: "2"})
    for attempt, node in enumerate(("node2", "node1")):
        files = [shared / f"at-{rank}.{attempt}" for rank in (0, 1)]
        steady_cluster.wait_for(lambda files=files: all(map(Path.exists, files)), f"no attempt {attempt}", timeout=400)
        # Of the rank, not of torchrun, whose command line has the module's name, too.
        steady_cluster.run("pkill", "-KILL", "-f", "python[0-9.]* -u -m tests.slurm.ran[k]", on=node)
    (shared / "go").touch()
    assert steady_cluster.wait_job(job, timeout=600) == "COMPLETED", steady_cluster.output(job)
    found = outcome.read(folder)
    assert found is not None
    assert (found.code, found.attempt, found.step) == (0, 2, NUM_STEPS)
    assert losses(folder) == on_one_node


def test_a_rank_with_another_learning_rate_ends_all(steady_cluster: Cluster, write_run: WriteRun) -> None:
    """Each rank alone is a run that works: nothing but the comparison at the start notices."""
    folder = steady_cluster.folder / "differing"
    script = steady_cluster.folder / "differing.sh"
    rate = "optimizer.learning_rate=1e-$((3 + SLURM_PROCID))"
    script.write_text(f"exec python -m engine.cli train {write_run()} folder={folder} {rate}\n")
    job = steady_cluster.sbatch(f"srun --ntasks-per-node=1 bash {script}", "--nodes=2", env=CPU)
    assert steady_cluster.wait_job(job, timeout=600) == "FAILED", steady_cluster.output(job)
    assert steady_cluster.job(job)["ExitCode"] == "2:0"
    found = outcome.read(folder)
    assert found is not None
    assert found.code == 2
    assert "optimizer.learning_rate: 0.001 on rank 0, 0.0001 on rank 1" in found.error


@pytest.mark.matrix
def test_tensor_ranks_that_are_dealt_out_over_nodes_are_a_warning(steady_cluster: Cluster, write_run: WriteRun) -> None:
    folder = steady_cluster.folder / "cyclic"
    run = write_run(parallel={"zero_stage": 1, "tensor": 2})
    script = f"srun --ntasks-per-node=2 -m cyclic palimpsest train {run} folder={folder}"
    job = steady_cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=2", env=CPU)
    assert steady_cluster.wait_job(job, timeout=600) == "COMPLETED", steady_cluster.output(job)
    words = "2 of 2 groups of the tensor axis are on several nodes (ranks 0, 1): each layer waits for the network; "
    assert words + "number the ranks node by node (srun --distribution=block" in steady_cluster.output(job)


@pytest.mark.parametrize("what", [pytest.param("stop", marks=matrix), "kill"])
def test_a_real_rank_that_is_lost_is_named(what: str, make_cluster: MakeCluster) -> None:
    """In its 9th step rank 1 stops, or dies; rank 0 waits in a collective, or loses its connection."""
    cluster = make_cluster(2)
    write_corpus(cluster.folder)
    run = _write(cluster.folder, cluster.folder, num_steps=10**4)
    chaos = {"CHAOS": json.dumps([{"what": what, "rank": 1, "step": 8}])}
    script = line("srun", "tests.chaos.rank", "train", run)
    job = cluster.sbatch(script, "--nodes=2", "--no-requeue", env=CPU | chaos)
    assert cluster.wait_job(job, timeout=800) == "FAILED", cluster.output(job)
    found = outcome.read(cluster.folder / "run")
    assert found is not None
    assert (found.code, found.rank, found.step) == (1, 1, 8), cluster.output(job)
    if what == "kill":
        assert found.error.startswith("rank 1 ended without a word in step 9 (forward and backward) on node2")
    else:
        assert "its process is stopped (SIGSTOP), in stop (tests/chaos/rank.py:" in found.error
        assert "rank 0 waits in " in found.error
        assert "engine/train/trainer.py" in (cluster.folder / f"run/logs/hang-{job}.0.txt").read_text()
