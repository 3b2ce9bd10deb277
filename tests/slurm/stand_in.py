"""A rank without torch, for tests of launchers: it starts as `palimpsest train` does, and then waits for the others.

`python -m tests.slurm.stand_in SPEC.json`, where the file holds `folder` (the run folder), `steps`, `launch` (limits of
a run), `save_every` (steps between two saves; none by default), `deaf` (true: requests to stop are not heard), and
`fault`: null, or what befalls which rank in which step, or that no save succeeds in an attempt after a request to stop.
A stand-in takes the run folder, has a heartbeat and a watcher, meets the others after each step, through files, and
goes on from the step that was saved last.
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
from engine.atomic import write_atomically
from engine.config.rank_environment import RankEnvironment
from engine.config.schema.run import LaunchConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE
from engine.heartbeat import Heartbeat
from engine.outcome import Outcome
from engine.train.signals import StopSignals
from launcher.environment import is_supervised, rank_environment, run_folder
from launcher.meeting_point import check_meeting_point
from launcher.rank_watcher import heartbeat_folder, start_watcher
from launcher.threads import share_cores
from tests.slurm.hold import Hold
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
        hold, saved = Hold(os.environ, environment), Path(spec["folder"]) / "saved"
        first = done = int(saved.read_text()) if saved.exists() else 0
        for step in range(first, spec["steps"]):
            hold.before_step(step, lambda: signals.stop_requested)
            for phase in ("data", "forward and backward"):
                heart.beat(step, phase)
                time.sleep(0.02)
            fault = spec.get("fault") or {}
            if [fault.get("rank"), fault.get("step")] == [environment.global_rank, step]:
                strike(fault["what"])
            heart.beat(step, "loss")
            stop = False

            def reduce(step: int = step) -> None:
                nonlocal stop
                stop = progress.meet(step + 1, signals.stop_requested and not spec.get("deaf"))

            all_reduce(reduce)
            hold.after_step()
            done = step + 1
            print(f"step {done:6}/{spec['steps']}", flush=True)
            if stop and fault.get("what") == "no save" and environment.attempt == fault["attempt"]:
                words = "OSError: No space left on device"
                folder.note_failure(Outcome(environment.job, environment.attempt, EXIT_FAILURE, done, 0, words))
                return EXIT_FAILURE
            if environment.global_rank == 0 and (stop or done % spec.get("save_every", spec["steps"]) == 0):
                write_atomically(saved, str(done))
            if stop:
                break
        # more than asked for: saved by a longer start before this one
        code = EXIT_DONE if done >= spec["steps"] else EXIT_REQUEUE
        heart.beat(done, "end")
        if environment.global_rank == 0:
            folder.note(Outcome(environment.job, environment.attempt, code, done))
        if code == EXIT_REQUEUE:
            signals.ignore_from_now_on()
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

    def meet(self, step: int, stop_requested: bool = False) -> bool:
        """Wait until all ranks have come to a step; return True if any of them was asked to stop by then."""
        (self._folder / f"{step}-{self._environment.global_rank}{'-stop' if stop_requested else ''}").touch()
        while len(found := list(self._folder.glob(f"{step}-*"))) < self._environment.world_size:
            time.sleep(0.01)
        return any(path.name.endswith("-stop") for path in found)


if __name__ == "__main__":
    sys.exit(main())
