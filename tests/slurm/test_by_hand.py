"""`slurm/by-hand.sbatch` as it stands, with real ranks: told to save, it is requeued and goes on where it saved."""

from __future__ import annotations

import json

import pytest

from engine import outcome
from tests.slurm import hold
from tests.slurm.cluster import PATH, ROOT, MakeCluster
from tests.slurm.launches import HOLD_AT, PYTHON_PATH, Launch, losses, requeued, tree, undisturbed, write_corpus


@pytest.mark.matrix
def test_the_script_by_hand_saves_at_its_signal_and_is_requeued(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    shared, run = cluster.folder, cluster.folder / "run"
    write_corpus(shared)
    (shared / "RUN.yaml").write_text(json.dumps(tree(shared, run)))
    palimpsest = shared / "bin" / "palimpsest"
    palimpsest.parent.mkdir()
    palimpsest.write_text(f'#!/bin/bash\nexec {PYTHON_PATH} -u -m tests.slurm.rank "${{@:2}}"\n')
    palimpsest.chmod(0o755)
    own = {
        "RUN": str(shared / "RUN.yaml"),
        "PATH": f"{palimpsest.parent}:{PATH}",
        hold.FOLDER: str(shared),
        hold.HOLD_AT: str(HOLD_AT),
        "OMP_NUM_THREADS": "1",
    }
    # The command line wins over the script, which asks for eight GPUs per node.
    small = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={shared}/job-%j.out")
    number = cluster.run("sbatch", "--parsable", *small, ROOT / "slurm/by-hand.sbatch", env=own).stdout.strip()
    job = Launch(cluster, run, number)
    job.wait_for_hold()
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    job.wait_for_hold(1000)
    assert requeued(job) == 1
    saved = outcome.read(run)
    assert saved is None, "the second start has taken the folder"
    job.go()
    assert cluster.wait_job(int(number), timeout=300) == "COMPLETED", cluster.output(int(number))
    ended = outcome.read(run)
    assert ended is not None
    assert (ended.code, ended.attempt, ended.step) == (0, 1000, 9)
    assert "resuming from" in cluster.output(int(number))
    assert losses(run) == pytest.approx(undisturbed(shared / "undisturbed"), rel=0, abs=1e-5)
