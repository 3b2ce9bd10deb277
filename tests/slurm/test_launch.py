"""`palimpsest launch --launcher slurm` on the simulated cluster, with two real ranks, hit by the faults of clusters.

Asserted are the order of events, the nodes of each attempt and the losses; never seconds.
"""

from __future__ import annotations

import pytest

from tests.slurm.cluster import MakeCluster
from tests.slurm.launches import launch, losses, undisturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_the_loss_of_a_node_leaves_the_job_on_the_other(make_cluster: MakeCluster, expected: list[float]) -> None:
    cluster = make_cluster(2)
    job = launch(cluster, "1-2", "--restarts", "2")
    job.wait_for_hold()
    cluster.power_off("node2")
    job.wait(lambda: len(job.attempts()) > 1, "no second attempt")
    job.go()
    ended = job.end()
    assert (ended.code, ended.attempt, ended.step) == (0, 1, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node1"]]
    assert cluster.job(int(job.number))["Restarts"] == "0", "within the job"
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)
