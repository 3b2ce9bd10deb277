"""`palimpsest launch --launcher slurm` hit by the faults of clusters, with stand-ins for the ranks.

Asserted are the order of events, the nodes of each attempt and the step from which it goes on; test_launch.py has real
ranks for each fault, and compares losses.
"""

from __future__ import annotations

import re

import pytest

from launcher.slurm.spec import LOGS
from tests.slurm.cluster import PATH, Cluster, MakeCluster
from tests.slurm.launches import Launch, launch, requeued

SMI = """#!/bin/bash
# Lists as many GPUs as the file of this host says.
for number in $(seq $(cat {folder}/gpus-$(hostname))); do
    case $* in
        -L) echo "GPU $((number - 1)): NVIDIA H100 80GB HBM3 (UUID: GPU-$number)" ;;
        *) echo "NVIDIA H100 80GB HBM3, 550.54.15, 4" ;;
    esac
done
"""


def steps(job: Launch, attempt: int) -> list[int]:
    """Return the steps that rank 0 has done in an attempt."""
    text = (job.folder / LOGS / f"rank-0.{attempt}.log").read_text()
    return [int(step) for step in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


def live_ranks(cluster: Cluster, node: str) -> list[str]:
    return processes(cluster, node, "tests.slurm.stand_in")


def agents(cluster: Cluster, node: str) -> list[str]:
    return processes(cluster, node, "launcher.slurm.agent")


def processes(cluster: Cluster, node: str, name: str) -> list[str]:
    lines = cluster.run("ps", "-e", "-o", "args", on=node).stdout.splitlines()
    return [line for line in lines if name in line and "srun" not in line]


@pytest.mark.parametrize(
    ("fault", "cure"), [("power_off", ""), ("freeze", "thaw"), pytest.param("cut", "mend", marks=pytest.mark.matrix)]
)
def test_a_node_is_lost_long_before_slurm_notices(fault: str, cure: str, make_cluster: MakeCluster) -> None:
    """Slurm's clock is its default one, 300 s. What a node that comes back still does is of no consequence."""
    cluster = make_cluster(2, slurmd_timeout=300)
    job = launch(cluster, "1-2", "--restarts", "2", stand_ins=True)
    job.wait_for_hold()
    getattr(cluster, fault)("node2")
    job.wait_for_hold(1, 0)
    assert "down" not in cluster.node_states()["node2"], "Slurm has not noticed"
    assert job.said()[1:] == [
        "failed: node node2 is lost: no sign of life for 8 s (ranks 1)",
        "restart 1 of 2 on 1 ranks (pipe 1 x data 1 x sequence 1 x tensor 1) on node1",
    ]
    if cure:
        getattr(cluster, cure)("node2")
        job.wait(lambda: not live_ranks(cluster, "node2"), "the old rank lives")
        # Whether it is welcomed by the conductor or finds its sign of life, it leaves the job alone.
        job.wait(lambda: not agents(cluster, "node2"), "the agent does not leave")
    job.go()
    ended = job.outcome_of(1)
    assert (ended.code, ended.step) == (0, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node1"]]
    assert requeued(job) == 0, "within the job"
    assert steps(job, 1) == [4, 5, 6, 7, 8, 9], "from the newest checkpoint on"


def test_a_first_node_that_is_cut_off_is_fenced(make_cluster: MakeCluster) -> None:
    """Conductor and first rank live on there, while an agent of the others has the job requeued."""
    job = launch(make_cluster(3), "2", "--requeues", "1", stand_ins=True)
    job.wait_for_hold()
    job.cluster.cut("node1")
    job.wait_for_hold(1000)
    # The old rank may go on from here, too, and tell of its end.
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    job.cluster.mend("node1")
    job.wait(lambda: not live_ranks(job.cluster, "node1"), "the old rank lives")
    assert job.end() == ended, "the old attempt has changed nothing"
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node2", "node3"]]
    assert requeued(job) == 1
    assert steps(job, 1000) == [4, 5, 6, 7, 8, 9]


def test_a_job_that_is_told_to_save_is_requeued_up_to_its_limit(make_cluster: MakeCluster) -> None:
    """USR1 to the batch script, as at the time limit: once it is requeued, twice is more than its limit."""
    job = launch(make_cluster(2), "2", "--requeues", "1", stand_ins=True)
    job.wait_for_hold()
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_hold(1000)
    assert requeued(job) == 1
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    ended = job.end("FAILED")
    assert (ended.code, ended.attempt, ended.step) == (85, 1000, 7)
    assert requeued(job) == 1
    said = job.said()
    assert "requeue 1 of 1" in said
    assert said[-1] == "not requeued: all 1 requeues are used up; submit it again to go on"
    # The same launch goes on where the last job has saved.
    job.go()
    again = launch(job.cluster, "2", stand_ins=True)
    assert again.end().code == 0
    assert steps(again, 0) == [8, 9]


@pytest.mark.matrix
def test_ranks_that_cannot_save_when_told_to_stop_go_on_from_an_earlier_checkpoint(make_cluster: MakeCluster) -> None:
    job = launch(make_cluster(2), "2", "--requeues", "5", stand_ins=True, fault={"what": "no save", "attempt": 0})
    job.wait_for_hold()
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_hold(1000)
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert any("No space left on device" in words for words in job.said())
    assert "requeue 1 of 5" in job.said()
    assert steps(job, 1000) == [4, 5, 6, 7, 8, 9]


def test_a_preempted_job_saves_and_goes_on_when_the_other_one_is_over(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2, kill_wait=120)
    job = launch(cluster, "2", "--requeues", "1", stand_ins=True)
    job.wait_for_hold()
    urgent = cluster.sbatch(
        f"while [ ! -e {cluster.folder}/served ]; do sleep 0.1; done", "--partition=urgent", "--nodes=2", "--exclusive"
    )
    cluster.wait_job(urgent, "RUNNING")
    cluster.wait_job(int(job.number), "PENDING")
    assert job.said()[-2:] == [
        "saved at step 6 and wants to be started again (exit code 85)",
        "Slurm has requeued the job by itself, as it does after a preemption",
    ]
    (cluster.folder / "served").touch()
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert requeued(job) == 1
    assert steps(job, 1000) == [7, 8, 9]


def test_a_job_is_shown_and_cancelled_by_commands(make_cluster: MakeCluster) -> None:
    job = launch(make_cluster(2), "2", "--requeues", "5", stand_ins=True)
    job.wait_for_hold()
    shown = job.palimpsest("job", "status", str(job.run))
    assert f"job {job.number} (run): RUNNING for " in shown
    assert "attempt 0: 2 ranks (" in shown
    listed = [row.split()[:2] for row in job.palimpsest("job", "list").splitlines()]
    assert [job.number, "RUNNING"] in listed
    logs = job.palimpsest("job", "logs", job.number, "--lines", "3")
    assert "== rank 0 on node1 (" in logs
    assert "step      5/9" in logs
    job.palimpsest("job", "cancel", job.number)
    ended = job.end("FAILED")
    assert (ended.code, ended.step) == (85, 6), "the step at which it was held is finished"
    assert "it was cancelled with `palimpsest job cancel`" in job.said()[-1]
    assert requeued(job) == 0


def test_nodes_that_fail_their_checks_are_left_out_and_told(make_cluster: MakeCluster) -> None:
    """node2 has a lock that a killed build has left, node3 lacks a GPU, and node4 cannot write to the run folder."""
    cluster = make_cluster(4, gpus=2)
    shared, lock = cluster.folder, "/tmp/extensions/op/lock"
    for host in cluster.nodes:
        cluster.run("mkdir", "-p", "/tmp/extensions/op", on=host)
        (shared / f"gpus-{host}").write_text("1" if host == "node3" else "2")
    cluster.run("touch", "-d", "2 hours ago", lock, on="node2")
    fill_disk(cluster, "node4")
    smi = shared / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI.format(folder=shared))
    smi.chmod(0o755)
    own = {"TORCH_EXTENSIONS_DIR": "/tmp/extensions", "PATH": f"{smi.parent}:{PATH}"}
    options = ("--gpus-per-node", "2", "--ranks-per-node", "1")
    job = launch(cluster, "1-4", *options, stand_ins=True, env=own)
    job.go()
    assert job.end().code == 0
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1"]]
    told = [words.partition(" (to do: ")[0] for words in job.said()]
    assert f"preflight, node2: build locks: {lock}: every rank would wait for it for ever" in told
    assert "preflight, node3: GPUs: 1 found" in told
    assert f"preflight, node4: disk: {job.run}: No space left on device" in told


def fill_disk(cluster: Cluster, node: str) -> None:
    """Give a node a run folder without room, in which it sees the folder of the job all the same."""
    jobs = cluster.folder / "run" / "jobs"
    jobs.mkdir(parents=True)
    script = cluster.folder / "fill.sh"
    script.write_text(f"""set -e
mkdir -p /tmp/kept
mount --bind {jobs} /tmp/kept
mount -t tmpfs -o size=16k tmpfs {jobs.parent}
mkdir {jobs}
mount --bind /tmp/kept {jobs}
dd if=/dev/zero of={jobs.parent}/full bs=4k 2>/dev/null || true
""")
    cluster.run("bash", script, on=node)


def test_a_port_that_is_taken_is_told_by_preflight(steady_cluster: Cluster) -> None:
    listening = steady_cluster.folder / "listening"
    program = steady_cluster.folder / "listen.py"
    listen = "server = socket.create_server(('', 23999))"
    program.write_text(f"import pathlib, socket\n{listen}\npathlib.Path('{listening}').touch()\nserver.accept()\n")
    server = steady_cluster.start("python", program, on="node1")
    try:
        steady_cluster.wait_for(listening.exists, "nobody listens")
        meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "23999"}
        srun = ("srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1")
        done = steady_cluster.run(*srun, "palimpsest", "preflight", env=meeting, check=False)
        assert done.returncode != 0  # 143, where the rank that waits is ended
        assert re.search(r"^failed +port +node1: 23999: Address already in use$", done.stdout, re.MULTILINE), done
    finally:
        steady_cluster.run("pkill", "-f", "listen.p[y]", on="node1", check=False)
        server.wait(60)
