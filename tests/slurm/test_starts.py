"""Starts on two nodes: where ranks meet, what keeps two starts apart, and what is refused. Stand-ins without torch.

| start | srun | mpirun | torchrun under srun |
| --- | --- | --- | --- |
| ranks meet without MASTER_ADDR | here | here | test_losses.py |
| two steps of one job at a time | here | here | one name for all agents (tests/launcher) |
| cores and threads of each rank | here | here | torchrun sets one thread |
| an older attempt that wakes up | here | as srun | as srun |
| a second signal while ranks wait for each other | here, real ranks | | |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from tests.slurm.cluster import Cluster, MakeCluster
from tests.slurm.launchers import line, reason_to_skip

SMOKE = Path(__file__).parents[2] / "configs/smoke/gpt2.yaml"
LIMITS = {"step_limit_seconds": 8.0, "step_limit_factor": 1.0, "start_limit_seconds": 25.0}


def spec(folder: Path, **more: Any) -> Path:
    """Write the file of a stand-in's run, whose folder is `folder`."""
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"folder": str(folder), "steps": 3, "launch": LIMITS} | more))
    return path


def ranks(text: str) -> list[dict[str, Any]]:
    """Return what the ranks in an output have said of themselves, by rank."""
    found = [json.loads(part.partition("rank ")[2]) for part in text.splitlines() if part.startswith("rank {")]
    return sorted(found, key=lambda rank: rank["global_rank"])


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_ranks_meet_and_share_the_cores_of_their_node(launcher: str, steady_cluster: Cluster) -> None:
    """Four ranks, no MASTER_ADDR; mpirun starts those of the second node through a step of its own."""
    if reason := reason_to_skip(launcher):
        pytest.skip(reason)
    folder = steady_cluster.folder / f"meet-{launcher}"
    script = line(launcher, "tests.slurm.stand_in", spec(folder), per_node=2)
    job = steady_cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=2", "--exclusive")
    assert steady_cluster.wait_job(job) == "COMPLETED", steady_cluster.output(job)
    # mpirun may lose or mix what its ranks print
    found = [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(4)]
    assert [rank["global_rank"] for rank in found] == [0, 1, 2, 3]
    assert {(rank["master_addr"], rank["job"], rank["world_size"]) for rank in found} == {("node1", str(job), 4)}
    assert len({rank["master_port"] for rank in found}) == 1
    cores = [rank["cores"] for rank in found]
    if launcher == "srun" and len(set(map(tuple, cores))) > 1:  # a machine with one core has one share
        assert cores[:2] == cores[2:], "the nodes are this machine"
        assert not set(cores[0]) & set(cores[1])
    assert [rank["threads"] for rank in found] == [str(len(own)) for own in cores]


def test_pods_of_kubernetes_meet(steady_cluster: Cluster) -> None:
    """Two pods with the variables of an operator, and two of an indexed job with a service's name for rank 0."""
    operator = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "node1", "PET_MASTER_PORT": "23456"}
    indexed = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "23457"}
    for name, number, variables in (("pet", "PET_NODE_RANK", operator), ("index", "JOB_COMPLETION_INDEX", indexed)):
        folder = steady_cluster.folder / name
        command = ("python", "-m", "tests.slurm.stand_in", spec(folder))
        pods = [
            steady_cluster.start(*command, on=f"node{index + 1}", env=variables | {number: str(index)})
            for index in range(2)
        ]
        texts = [pod.communicate(timeout=200)[0] for pod in pods]
        assert [pod.returncode for pod in pods] == [0, 0], texts
        assert [(rank["global_rank"], rank["launcher"]) for rank in ranks("\n".join(texts))] == [
            (0, "kubernetes"),
            (1, "kubernetes"),
        ]
        found = outcome.read(folder)
        assert found is not None
        assert found.code == 0


@pytest.mark.parametrize("launcher", ["srun", pytest.param("mpirun", marks=pytest.mark.matrix)])
def test_two_starts_in_one_job_keep_apart(launcher: str, steady_cluster: Cluster) -> None:
    if reason := reason_to_skip(launcher):
        pytest.skip(reason)
    folders = [steady_cluster.folder / f"{launcher}-{name}" for name in ("one", "other")]
    lines = [line(launcher, "tests.slurm.stand_in", spec(folder, steps=60)) for folder in folders]
    overlap = [part.replace("srun ", "srun --overlap ") for part in lines]
    script = "\n".join(f"{part} > {folder}.out & " for part, folder in zip(overlap, folders, strict=True)) + "\nwait"
    job = steady_cluster.sbatch(script, "--nodes=2")
    assert steady_cluster.wait_job(job) == "COMPLETED", steady_cluster.output(job)
    for folder in folders:
        found = outcome.read(folder)
        assert found is not None, steady_cluster.output(job)
        assert (found.code, found.job) == (0, str(job))
    one, other = ([json.loads(path.read_text()) for path in folder.glob("rank-*.json")] for folder in folders)
    assert len(one) == len(other) == 2
    assert {rank["step"] for rank in one}.isdisjoint({rank["step"] for rank in other})
    assert {rank["master_port"] for rank in one}.isdisjoint({rank["master_port"] for rank in other})


@pytest.mark.parametrize("command", ["train", "launch"])
def test_a_forgotten_srun_is_said(command: str, steady_cluster: Cluster) -> None:
    job = steady_cluster.sbatch(f"palimpsest {command} {SMOKE}", "--nodes=2", "--ntasks-per-node=2")
    assert steady_cluster.wait_job(job) == "FAILED"
    assert "srun was forgotten: job" in steady_cluster.output(job), steady_cluster.output(job)
    assert "srun palimpsest train RUN.yaml" in steady_cluster.output(job)


def test_a_later_word_of_an_older_attempt_is_not_heard(make_cluster: MakeCluster) -> None:
    """The first node is cut off: Slurm starts the job again on the others, while the old rank 0 still writes."""
    cluster = make_cluster(3)
    folder = cluster.folder / "run"
    # The first start does not end, whoever asks: its rank 0 waits for the other one. The second one has three steps.
    first, second = spec(folder, steps=10**6, deaf=True), spec(cluster.folder / "again")
    again = json.loads(second.read_text()) | {"folder": str(folder)}
    second.write_text(json.dumps(again))
    started = line("srun", "tests.slurm.stand_in", f"$([ -z $SLURM_RESTART_COUNT ] && echo {first} || echo {second})")
    job = cluster.sbatch(started, "--nodes=2", "--requeue")
    cluster.wait_for(lambda: (folder / f"progress-{job}-0" / "60-1").exists(), "no step is done")
    assert cluster.job(job)["BatchHost"] == "node1"
    cluster.cut("node1")
    assert cluster.wait_job(job, "COMPLETED", timeout=400) == "COMPLETED"
    # The watcher of the old rank 0 has noticed that nobody answers, and what it says is about attempt 0.
    cluster.wait_for(lambda: (folder / f"logs/hang-{job}.0.txt").exists(), "the old rank is still waiting")
    cluster.wait_for(lambda: not old_ranks(cluster), "the old rank lives")
    found = outcome.read(folder)
    assert found is not None
    assert (found.job, found.attempt, found.code) == (str(job), 1000, 0)
    cluster.mend("node1")


def old_ranks(cluster: Cluster) -> list[str]:
    lines = cluster.run("ps", "-e", "-o", "args", on="node1").stdout.splitlines()
    return [line for line in lines if "stand_in" in line and not line.startswith(("srun", "bash", "/bin/bash"))]


def test_a_second_signal_ends_ranks_that_wait_for_one_that_never_comes(steady_cluster: Cluster) -> None:
    """Real ranks: two of a world of three are in torch's rendezvous, which no handler in Python interrupts."""
    folder = steady_cluster.folder / "waiting"
    script = steady_cluster.folder / "waiting.sh"
    # SLURM_PROCID 2 is a task that is no rank.
    train = f"exec python -m engine.cli train {SMOKE} folder={folder} stages.0.global_batch_size=9"
    script.write_text(f"[ $SLURM_PROCID = 2 ] && exec sleep 600\n{train}\n")
    options = ("--nodes=2", "--ntasks=3", "--overcommit")
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    job = steady_cluster.sbatch(f"srun bash {script}; echo code $?", *options, "--job-name=waiting", env=env)
    steady_cluster.wait_for(lambda: "meeting 2 other ranks" in steady_cluster.output(job), "ranks do not meet")
    stop = ("scancel", "--signal=TERM", f"{job}.0")
    steady_cluster.run(*stop)
    steady_cluster.wait_for(lambda: "once more ends this rank at once" in steady_cluster.output(job), "no word")

    def ended() -> bool:
        steady_cluster.run(*stop, check=False)  # within five seconds it counts as the first
        return "second SIGTERM: ending at once" in steady_cluster.output(job)

    steady_cluster.wait_for(ended, "the second signal does not end it")
    steady_cluster.run("scancel", str(job))
