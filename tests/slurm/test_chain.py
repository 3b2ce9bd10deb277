"""Chains, jobs that submit their successors, and preflight as a job, on the simulated cluster.

Asserted are the links and starts, the order of events and the losses; never seconds.
"""

from __future__ import annotations

import json
import re

import pytest

from engine import outcome
from tests.slurm.cluster import MakeCluster
from tests.slurm.launches import PYTHON_PATH, Launch, launch, losses, undisturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nobody disturbs."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def links_of(job: Launch) -> dict[str, str]:
    """Return the states of a chain's links by their names; those that never ran are under the number of the array."""
    shown = job.cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job.number}", "--format=%i %T").stdout
    return dict(line.split() for line in shown.splitlines())


def test_a_chain_takes_as_many_links_as_the_run_needs(make_cluster: MakeCluster, expected: list[float]) -> None:
    """The ranks of the first link leave ahead of its time limit; the second finishes, and the third never starts."""
    # The first link stops a minute after its start; those that wait get time enough.
    job = launch(make_cluster(2), "2", "--chain", "3", "--time", "60", launch={"stop_before_seconds": 59 * 60.0})
    job.cluster.run("scontrol", "update", f"JobId={job.number}_[2-3]", "TimeLimit=600")
    job.wait(lambda: job.attempts(), "the first link does not start")
    status = job.palimpsest("job", "status", str(job.run))
    assert f"job {job.number}_1 (run): RUNNING for " in status
    assert "links of the chain: 1 RUNNING, 2-3 PENDING" in status
    log = job.folder / "logs" / "rank-0.0.log"
    job.wait(lambda: log.exists() and "time limit is near" in log.read_text(), "the first link does not stop")
    job.go()
    job.wait(lambda: set(links_of(job).values()) == {"FAILED", "COMPLETED", "CANCELLED"}, "the chain does not end")
    ended = outcome.read(job.run)
    assert ended is not None
    assert (ended.code, ended.job, ended.attempt, ended.step) == (0, job.number, 1000, 9)
    links = [(attempt["job"], attempt["attempt"]) for attempt in job.attempts()]
    assert links == [(f"{job.number}_1", 0), (f"{job.number}_2", 1000)]
    said = job.said()
    assert any(words.startswith("saved at step ") for words in said)
    assert "link 1 of 3 is over, the next one goes on" in said
    assert said[-1] == "the chain ends at link 2 of 3: the run is done"
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)
    states = links_of(job)
    assert (states.pop(f"{job.number}_1"), states.pop(f"{job.number}_2")) == ("FAILED", "COMPLETED")
    assert list(states.values()) == ["CANCELLED"], "it waited, and was not wanted"


@pytest.mark.matrix
def test_a_chain_is_cancelled_as_a_whole(make_cluster: MakeCluster) -> None:
    job = launch(make_cluster(2), "2", "--chain", "3", "--time", "60")
    job.wait_for_hold()
    job.palimpsest("job", "cancel", job.number)
    job.wait(lambda: sorted(links_of(job).values()) == ["CANCELLED", "FAILED"], "the chain does not end")
    assert job.said()[-1].startswith("the chain ends at link 1 of 3: it was cancelled with `palimpsest job cancel`")
    ended = outcome.read(job.run)
    assert ended is not None
    assert (ended.code, ended.step) == (85, 6), "the step at which it was held is finished"


@pytest.mark.matrix
def test_a_job_submits_its_successor_where_slurm_requeues_nothing(
    make_cluster: MakeCluster, expected: list[float]
) -> None:
    job = launch(make_cluster(2), "2", "--requeues", "1", "--slurm", "requeue=resubmit")
    first = job.number
    job.wait_for_hold()
    job.cluster.run("scancel", "--batch", "--signal=USR1", first)
    job.wait_for_hold(1000)
    numbers = (job.folder / "number").read_text().split()
    assert numbers[0] == first
    assert job.cluster.job(int(first))["Restarts"] == "0"
    status = job.palimpsest("job", "status", first)
    assert f"job {numbers[1]} (run): RUNNING for " in status
    # Its own limit counts the submissions: the second start is the last.
    job.cluster.run("scancel", "--batch", "--signal=USR1", numbers[1])
    job.number = numbers[1]
    ended = job.end("FAILED")
    assert (ended.code, ended.job, ended.attempt) == (85, first, 1000)
    assert job.said()[-1] == "not requeued: all 1 requeues are used up; submit it again to go on"
    job.go()
    assert launch(job.cluster, "2").end().code == 0
    assert losses(job.run) == pytest.approx(expected, rel=0, abs=1e-5)


def test_preflight_as_a_job(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    # What a build that was killed has left on one node.
    lock = "/tmp/extensions/cpu_adam/lock"
    cluster.run("mkdir", "-p", "/tmp/extensions/cpu_adam", on="node2")
    cluster.run("touch", "-d", "2 hours ago", lock, on="node2")
    options = (
        "--launcher",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--slurm",
        "allocation.mem=null",
        "--json",
    )
    command = (PYTHON_PATH, "-m", "engine.cli", "preflight", *options)
    done = cluster.run(*command, cwd=cluster.folder, env={"TORCH_EXTENSIONS_DIR": "/tmp/extensions"})
    [number] = re.findall(r"job (\d+)", done.stdout)
    assert cluster.wait_job(int(number)) == "FAILED", "a node is not fit"
    [output] = cluster.folder.glob(f"preflight/*/preflight-{number}.log")
    text = output.read_text()
    tree = json.loads(text[text.index("{\n") : text.rindex("}\n") + 2])
    assert [node["host"] for node in tree["nodes"]] == ["node1", "node2"]
    failed = [
        (node["host"], one["check"]) for node in tree["nodes"] for one in node["findings"] if one["level"] == "failed"
    ]
    assert failed == [("node2", "build locks")]
    assert list(tree["network"]["pairs"]) == ["node1 - node2"]
