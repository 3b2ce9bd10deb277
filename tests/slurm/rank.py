"""`python -m tests.slurm.rank RUN.yaml ...`: a rank as `palimpsest train` is one, which waits at a step to be hit.

Before each step it waits for its own part of a checkpoint in flight: which checkpoints are there when a test strikes
then follows from the steps alone.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from engine import cli
from engine.train.trainer import Trainer
from launcher.environment import rank_environment
from tests.slurm.hold import Hold


def main() -> int:
    hold = Hold(os.environ, rank_environment(os.environ))
    fit = Trainer.fit

    def fit_with_hold(trainer: Trainer) -> int:
        train = trainer.pipeline.train

        def train_with_hold(*arguments: Any) -> Any:
            wait_for_writing(trainer)
            hold.before_step(trainer.state.step, lambda: trainer.requests.stop_requested)
            found = train(*arguments)
            hold.after_step()
            return found

        vars(trainer.pipeline)["train"] = train_with_hold
        return fit(trainer)

    setattr(Trainer, "fit", fit_with_hold)  # noqa: B010
    return cli.main(["train", *sys.argv[1:]])


def wait_for_writing(trainer: Trainer) -> None:
    checkpoints = trainer.checkpoints
    while checkpoints._saver.in_flight is not None and not any(checkpoints.save_flags()):
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
