"""The simulated cluster: real jobs on nodes of their own, and what becomes of it under each fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster, MakeCluster, missing


def test_ranks_run_on_nodes_of_their_own(steady_cluster: Cluster) -> None:
    own = "hostname > /tmp/name; cat /tmp/*name; ls /dev/shm; cat /etc/hosts | grep -c 10.77.0"
    done = steady_cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "--label", "bash", "-c", own)
    assert sorted(done.stdout.split("\n")) == ["", "0: 3", "0: node1", "1: 3", "1: node2"], "no folder is shared"
    assert steady_cluster.run("cat", "/tmp/name", on="node2").stdout == "node2\n"
    assert not Path("/tmp/name").exists(), "nothing leaves the cluster"


def test_a_batch_job_ends_and_leaves_its_output_on_the_shared_disk(steady_cluster: Cluster) -> None:
    job = steady_cluster.sbatch("srun hostname; exit 3", "--nodes=2")
    assert steady_cluster.wait_job(job) == "FAILED"
    assert sorted(steady_cluster.output(job).split()) == ["node1", "node2"]
    assert steady_cluster.job(job)["ExitCode"] == "3:0"


@pytest.mark.skipif(bool(module.lacking("sshd")), reason="there is no sshd (apt-get install openssh-server)")
def test_nodes_are_reached_by_ssh(steady_cluster: Cluster) -> None:
    assert steady_cluster.run("ssh", "node2", "hostname", on="node1").stdout == "node2\n"


def test_gpus_are_handed_out_by_slurm(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1, gpus=4)
    done = cluster.run("srun", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert done.stdout == "0,1\n"


@pytest.mark.matrix
def test_clusters_side_by_side_do_not_meet(make_cluster: MakeCluster) -> None:
    one, other = make_cluster(2), make_cluster(1)
    one.power_off("node1")
    one.wait_nodes("down*", "node1")
    assert other.run("srun", "hostname").stdout == "node1\n"
    other.wait_nodes("idle")


@pytest.mark.matrix
def test_a_node_without_power_loses_its_processes_and_its_memory(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    job = cluster.sbatch("sleep 600", "--nodes=2", "--no-kill")
    cluster.wait_job(job, "RUNNING")
    cluster.run("touch", "/dev/shm/kept", on="node2")
    cluster.power_off("node2")
    cluster.wait_nodes("down*", "node2")
    assert cluster.job(job)["JobState"] == "RUNNING", "--no-kill"
    cluster.power_on("node2")
    cluster.wait_nodes("idle", "node2")
    assert cluster.run("ls", "/dev/shm", on="node2").stdout == ""


@pytest.mark.matrix  # Slurm takes a minute to ask a node again
@pytest.mark.parametrize(("fault", "cure"), [("cut", "mend"), ("freeze", "thaw")])
def test_a_node_that_does_not_answer_comes_back(make_cluster: MakeCluster, fault: str, cure: str) -> None:
    cluster = make_cluster(2)
    getattr(cluster, fault)("node2")
    cluster.wait_nodes("down*", "node2")
    getattr(cluster, cure)("node2")
    cluster.wait_nodes("idle", "node2")
    assert cluster.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"


@pytest.mark.matrix
def test_jobs_outlive_the_controller(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    job = cluster.sbatch(f"sleep 600 & touch {cluster.folder}/began; wait")
    cluster.wait_job(job, "RUNNING")
    cluster.stop_controller()
    assert cluster.run("squeue", check=False, env={"SLURM_MSG_TIMEOUT": "2"}).returncode != 0
    cluster.start_controller()
    cluster.wait_nodes("mixed", timeout=60)
    assert cluster.job(job)["JobState"] == "RUNNING"


def test_all_processes_end_with_the_cluster(make_cluster: MakeCluster, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    with Cluster(folder) as cluster:
        job = cluster.sbatch("srun sleep 654321", "--nodes=4")
        cluster.wait_job(job, "RUNNING")
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if b"654321" in line or str(folder).encode() in line]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert missing.__wrapped__() == "the simulated cluster needs root"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name, path: None if name in ("srun", "ip") else name)
    assert missing.__wrapped__() == "the simulated cluster needs: apt-get install iproute2 slurm-client"
