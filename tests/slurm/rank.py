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
from tests.slurm.hold import Hold


def main() -> int:
    fit = Trainer.fit

    def fit_with_hold(trainer: Trainer) -> int:
        # The number of the attempt is the one on which the ranks have agreed, not that of the environment.
        train, hold = trainer.pipeline.train, Hold(os.environ, trainer.checkpoints.environment)

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
