"""`palimpsest launch --launcher slurm` on the simulated cluster, with two real ranks, hit by the faults of clusters.

Asserted are the order of events, the nodes of each attempt and the losses; never seconds. test_faults.py has the same
faults, and some more, with stand-ins for the ranks.
"""

from __future__ import annotations

import re

import pytest

from tests.slurm.cluster import MakeCluster
from tests.slurm.launches import launch, losses, requeued, undisturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nobody disturbs."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_the_loss_of_a_node_leaves_the_job_on_the_other(make_cluster: MakeCluster, expected: list[float]) -> None:
    job = launch(make_cluster(2), "1-2", "--restarts", "2")
    job.wait_for_hold()
    job.cluster.power_off("node2")
    job.wait(lambda: len(job.attempts()) > 1, "no second attempt")
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node1"]]
    assert requeued(job) == 0, "within the job"
    said = job.said()
    assert said[1].startswith("failed: node node2 is lost: no sign of life for 8 s (ranks 1)")
    assert said[2].startswith("restart 1 of 2 on 1 ranks (")
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_checkpoints_in_memory_outlive_their_node(make_cluster: MakeCluster, expected: list[float]) -> None:
    """The other node holds a copy of what the lost one had in memory; the disk has the third step alone."""
    # The save of the third step has ended after the fifth, the one in memory when the next one to the disk begins.
    job = launch(make_cluster(2), "1-2", "--restarts", "1", hold_at=6, checkpoint={"memory": {"every_steps": 1}})
    job.wait_for_hold()
    job.cluster.power_off("node2")
    job.wait(lambda: len(job.attempts()) > 1, "no second attempt")
    job.go()
    assert job.end().code == 0
    log = (job.folder / "logs" / "rank-0.1.log").read_text()
    [resumed_at] = re.findall(r"resuming from .*: step (\d+),", log)
    assert int(resumed_at) == 5, log
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


def test_a_rank_that_stands_still_is_named_and_the_ranks_start_again(
    make_cluster: MakeCluster, expected: list[float]
) -> None:
    cluster = make_cluster(2)
    (cluster.folder / "freeze-1").touch()
    (cluster.folder / "go").touch()
    job = launch(cluster, "2", "--restarts", "1", launch={"step_limit_seconds": 15.0, "step_limit_factor": 1.0})
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"]] * 2, "there is no other node"
    words = job.said()[1]
    assert words.startswith("failed: rank 1 hangs: silent for"), words
    assert "its process is stopped (SIGSTOP)" in words
    assert "rank 0 waits in " in words
    [stacks] = (job.run / "logs").glob("hang-*.txt")
    assert "tests/slurm/rank.py" in stacks.read_text()
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_the_time_limit_itself(make_cluster: MakeCluster, expected: list[float]) -> None:
    """Slurm sends the signal up to a minute early: it may come while the ranks are still starting."""
    job = launch(make_cluster(2), "2", "--requeues", "9", "--time", "2")
    job.wait(lambda: requeued(job) > 0, "the job is not requeued at its time limit")
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    job.go()
    ended = job.end()
    assert (ended.code, ended.step) == (0, 9)
    assert ended.attempt >= 1000
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_a_job_that_is_cancelled_saves_and_is_not_requeued(make_cluster: MakeCluster) -> None:
    job = launch(make_cluster(2, kill_wait=120), "2", "--requeues", "5")
    job.wait_for_hold()
    job.cluster.run("scancel", job.number)
    ended = job.end("CANCELLED")
    assert (ended.code, ended.step) == (85, 6), "the step at which it was held is finished"
    assert requeued(job) == 0
    assert list((job.run / "checkpoints").glob("*6*"))


@pytest.mark.matrix
def test_a_preempted_job_saves_and_goes_on_when_the_other_one_is_over(
    make_cluster: MakeCluster, expected: list[float]
) -> None:
    cluster = make_cluster(2, kill_wait=120)
    job = launch(cluster, "2", "--requeues", "1")
    job.wait_for_hold()
    urgent = cluster.sbatch("true", "--partition=urgent", "--nodes=2", "--exclusive")
    cluster.wait_job(urgent, "COMPLETED")
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert "saved at step 6 and wants to be started again (exit code 85)" in job.said()
    assert requeued(job) == 1
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_a_node_that_stands_still_is_left_out(make_cluster: MakeCluster, expected: list[float]) -> None:
    """Its agent is silent, too, so it is no rank that hangs; Slurm, with its default clock, notices nothing."""
    cluster = make_cluster(2, slurmd_timeout=300)
    job = launch(cluster, "1-2", "--restarts", "1")
    job.wait_for_hold()
    cluster.freeze("node2")
    job.go()
    ended = job.outcome_of(1)
    assert (ended.code, ended.step) == (0, 9)
    assert job.said()[1].startswith("failed: node node2 is lost: no sign of life for 8 s (ranks 1)")
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node1"]]
    cluster.thaw("node2")
    assert job.end() == ended, "the ranks that wake up change nothing"
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_the_loss_of_the_batch_host_requeues_the_job_once(make_cluster: MakeCluster, expected: list[float]) -> None:
    job = launch(make_cluster(3), "2", "--requeues", "1")
    job.wait_for_hold()
    job.cluster.power_off("node1")
    job.wait(lambda: any(attempt["attempt"] == 1000 for attempt in job.attempts()), "the job does not start again")
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node2", "node3"]]
    assert requeued(job) == 1
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_a_rank_is_killed_while_the_controller_is_away(make_cluster: MakeCluster, expected: list[float]) -> None:
    """Slurm is asked before each attempt: the conductor waits for its answer, and then starts the ranks again."""
    job = launch(make_cluster(2), "2", "--restarts", "1")
    job.wait_for_hold()
    job.cluster.stop_controller()
    job.cluster.run("pkill", "-KILL", "-f", "tests.slurm.ran[k]", on="node2")
    job.wait(lambda: any("slurmctld gives no answer" in words for words in job.said()), "the controller is not missed")
    job.cluster.start_controller()
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1, 9)
    assert any(words.startswith("failed: rank 1 was killed by SIGKILL in step 6") for words in job.said())
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.matrix
def test_a_batch_host_that_is_cut_off_is_fenced(make_cluster: MakeCluster, expected: list[float]) -> None:
    """The old conductor lives on, without Slurm and without the others; the job runs elsewhere, and is not harmed."""
    job = launch(make_cluster(3), "2", "--requeues", "1")
    job.wait_for_hold()
    job.cluster.cut("node1")
    job.wait(lambda: any(attempt["attempt"] == 1000 for attempt in job.attempts()), "the job does not start again")
    job.wait_for_hold(1000)
    job.cluster.mend("node1")
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert requeued(job) == 1
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)
