"""A rank without torch, for tests of launchers: it starts as `palimpsest train` does, and then waits for the others.

`python -m tests.slurm.stand_in SPEC.json`, where the file holds `folder` (the run folder), `steps`, `launch` (limits of
a run), and `fault`: null, or what befalls which rank in which step. It takes the run folder, has a heartbeat and a
watcher, and meets the others after each step, through files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from engine import heartbeat, logs
from engine.config.rank_environment import RankEnvironment
from engine.config.schema.run import LaunchConfig
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.heartbeat import Heartbeat
from engine.outcome import Outcome
from engine.train.signals import StopSignals
from launcher.environment import is_supervised, rank_environment, run_folder
from launcher.meeting_point import check_meeting_point
from launcher.rank_watcher import heartbeat_folder, start_watcher
from launcher.threads import share_cores
from tools.train import _enter

# The name of the file is that of the engine's collectives: whoever looks at the stack takes the rank for a waiting one.
scope: dict = {}
exec(compile("def all_reduce(wait):\n    wait()\n", "/x/engine/parallel/collectives.py", "exec"), scope)
all_reduce = scope["all_reduce"]


def main() -> int:
    spec = json.loads(Path(sys.argv[-1]).read_text())
    environment = rank_environment(os.environ)
    logs.configure(environment.global_rank, environment.world_size)
    with (
        StopSignals() as signals,
        heartbeat_folder(environment, heartbeat.given_folder(os.environ)) as beats,
        run_folder(Path(spec["folder"]), environment, os.environ) as folder,
    ):
        heart = Heartbeat(beats, environment.global_rank)
        heart.beat(0, "start")
        _enter(folder, environment)
        check_meeting_point(environment, os.environ)
        progress = Progress(Path(spec["folder"]) / f"progress-{environment.job}-{environment.attempt}", environment)
        progress.meet(0)
        folder.met = True
        if beats is not None and not is_supervised(os.environ):
            start_watcher(environment, LaunchConfig(**spec.get("launch", {})), folder, beats)
        share_cores(environment, os.environ, on_gpu=False)
        own = {"threads": os.environ["OMP_NUM_THREADS"], "cores": sorted(os.sched_getaffinity(0))}
        told = json.dumps(asdict(environment) | own)
        print("rank", told, flush=True)
        # A launcher may lose or mix what its ranks print.
        (Path(spec["folder"]) / f"rank-{environment.global_rank}.json").write_text(told)
        for step in range(spec["steps"]):
            for phase in ("data", "forward and backward"):
                heart.beat(step, phase)
                time.sleep(0.02)
            if (fault := spec.get("fault")) and [fault["rank"], fault["step"]] == [environment.global_rank, step]:
                strike(fault["what"])
            heart.beat(step, "loss")
            all_reduce(lambda step=step: progress.meet(step + 1))
            if signals.stop_requested:
                break
        code = EXIT_REQUEUE if signals.stop_requested else EXIT_DONE
        heart.beat(spec["steps"], "end")
        if environment.global_rank == 0:
            folder.note(Outcome(environment.job, environment.attempt, code, spec["steps"]))
        return code


def strike(what: str) -> None:
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "spin":
        spin()


def spin() -> None:
    """Go nowhere, in no collective."""
    while True:
        time.sleep(0.05)


class Progress:
    """Steps done by each rank, as files on the shared disk."""

    def __init__(self, folder: Path, environment: RankEnvironment) -> None:
        self._folder, self._environment = folder, environment
        folder.mkdir(parents=True, exist_ok=True)

    def meet(self, step: int) -> None:
        """Wait until all ranks have come to a step."""
        (self._folder / f"{step}-{self._environment.global_rank}").touch()
        while len(list(self._folder.glob(f"{step}-*"))) < self._environment.world_size:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
