"""Runs that `palimpsest launch --launcher slurm` submits on the simulated cluster, one rank per node.

The ranks are real ones (`tests.slurm.rank`), or stand-ins without torch where a test is about the launcher alone.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import outcome
from engine.config.load import merge
from engine.outcome import Outcome
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus
from tests.slurm import hold
from tests.slurm.cluster import ROOT, Cluster, ClusterError

NUM_STEPS, HOLD_AT = 9, 5
WAIT_SECONDS = 600.0
"""Upper bound of every wait: torch takes long to be imported on a busy machine."""
PYTHON_PATH = sys.executable
PYTHON = """#!/bin/bash
# The interpreter of the job, in which a test's ranks take the place of `palimpsest train`.
if [[ $* == *"engine.cli train"* ]]; then exec {python} -u -m {rank}; fi
exec {python} "$@"
"""


def tree(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of nine steps with a checkpoint after each third."""
    ordinary = run_tree(
        corpus,
        folder,
        checks=False,
        parallel={"zero_stage": 1},
        evaluation={"every_steps": None, "max_samples": 4},
        launch={"step_limit_seconds": 200.0, "start_limit_seconds": 250.0},
    )
    return merge(ordinary, changes)


def losses(run: Path) -> list[float]:
    """Return the loss of each step, in order; each step is there once."""
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def undisturbed(folder: Path, num_ranks: int = 2) -> list[float]:
    """Return the losses of the run that nobody disturbs, on ranks of this machine."""
    write_corpus(folder)
    run_ranks(num_ranks, train_rank, tree(folder, folder / "whole"))
    return losses(folder / "whole")


@dataclass
class Launch:
    """One job of a run in the cluster's shared folder."""

    cluster: Cluster
    run: Path
    number: str = ""

    @property
    def folder(self) -> Path:
        """The job's folder."""
        return next(path.parent for path in self.run.glob("jobs/*/number") if self.number in path.read_text().split())

    def log(self) -> str:
        """Return what the conductor has said."""
        paths = [
            path for path in self.folder.glob("conductor-*.log") if path.stem.startswith(f"conductor-{self.number}")
        ]
        return "".join(path.read_text(errors="replace") for path in sorted(paths))

    def palimpsest(self, *arguments: str) -> str:
        """Run a command on the login host, and return what it prints."""
        return self.cluster.run(PYTHON_PATH, "-m", "engine.cli", *arguments, cwd=ROOT).stdout

    def said(self) -> list[str]:
        """Return the conductor's lines for the user."""
        return re.findall(r"^palimpsest launch: (.*)$", self.log(), re.MULTILINE)

    def attempts(self) -> list[dict[str, Any]]:
        """Return the attempts that have begun."""
        path = self.folder / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for line in lines if "began" in (record := json.loads(line))]

    def wait(self, until: Callable[[], Any], what: str) -> Any:
        """Wait until something is true, and return it. Raises `ClusterError` with the logs."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := until()):
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}\n{self.everything()}")
            time.sleep(0.2)
        return found

    def wait_for_hold(self, attempt: int = 0, *ranks: int) -> None:
        """Wait until ranks (default: both) of an attempt stand at the step at which they wait."""
        shared = self.cluster.folder
        files = [shared / f"at-{rank}.{attempt}" for rank in ranks or (0, 1)]
        self.wait(lambda: all(file.exists() for file in files), f"ranks of attempt {attempt} do not come to step 5")

    def go(self) -> None:
        """Let the ranks pass that step from now on."""
        (self.cluster.folder / "go").touch()

    def state(self) -> str:
        """Return the job's state."""
        return self.cluster.job(int(self.number))["JobState"]

    def end(self, state: str = "COMPLETED") -> Outcome:
        """Wait until the job is in its last state, and return the outcome of the run."""
        found = self.cluster.wait_job(int(self.number), timeout=WAIT_SECONDS)
        assert found == state, self.everything()
        ended = outcome.read(self.run)
        assert ended is not None, self.everything()
        return ended

    def outcome_of(self, attempt: int) -> Outcome:
        """Wait for the outcome of an attempt, and return it; a job with a node that is gone ends much later."""

        def said() -> Outcome | None:
            found = outcome.read(self.run)
            return found if found is not None and found.attempt == attempt else None

        return self.wait(said, f"attempt {attempt} does not end")

    def everything(self) -> str:
        """Return all logs, for the message of a test that fails."""
        paths = [
            *self.run.glob("logs/*.log"),
            *self.run.glob("jobs/*/*.log"),
            *self.run.glob("jobs/*/logs/*"),
            *self.run.glob("jobs/*/attempts.jsonl"),
        ]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))


def requeued(job: Launch) -> int:
    """Return the number of times that a job was requeued."""
    return int(job.cluster.job(int(job.number))["Restarts"])


def launch(
    cluster: Cluster,
    nodes: str,
    *options: str,
    stand_ins: bool = False,
    fault: dict[str, Any] | None = None,
    hold_at: int = HOLD_AT,
    env: dict[str, str] | None = None,
    model_of: Path | None = None,
    **changes: Any,
) -> Launch:
    """Submit a run with one rank per node. Ranks wait for `Launch.go` once they have done `hold_at` steps.

    `fault` is one of those of `tests.slurm.stand_in`. With `model_of` the run starts from the weights in that folder,
    and its file has no `model`.
    """
    shared, run = cluster.folder, cluster.folder / "run"
    if not (shared / "corpus").exists() and not stand_ins:
        write_corpus(shared / "corpus")
    spec = {"folder": str(run), "steps": NUM_STEPS, "save_every": 3, "fault": fault}
    (shared / "spec.json").write_text(json.dumps(spec))
    python = shared / "python"
    rank = f"tests.slurm.stand_in {shared}/spec.json" if stand_ins else 'tests.slurm.rank "${@:5}"'
    python.write_text(PYTHON.format(python=PYTHON_PATH, rank=rank))
    python.chmod(0o755)
    variables = {hold.FOLDER: str(shared), hold.HOLD_AT: str(hold_at), "OMP_NUM_THREADS": "1"}
    site = {
        "source": "the simulated cluster",
        "python": str(python),
        "gpus": {"per_node": 0},
        "allocation": {"mem": None, "exclusive": False},
        "setup": {"variables": variables},
        "signal_seconds": 100,
    }
    (shared / "site.yaml").write_text(json.dumps(site))
    ordinary = tree(shared / "corpus", run, **changes)
    if model_of is not None:
        ordinary["init_from"] = str(model_of)
        del ordinary["model"]
    (shared / "RUN.yaml").write_text(json.dumps(ordinary))
    done = cluster.run(
        PYTHON_PATH, "-m", "engine.cli", "launch", str(shared / "RUN.yaml"), "--launcher", "slurm",
        "--site", str(shared / "site.yaml"), "--nodes", nodes, *options, cwd=ROOT, env=env,
    )  # fmt: skip
    return Launch(cluster, run, re.findall(r"job (\d+)", done.stdout)[0])
