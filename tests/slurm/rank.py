"""`python -m tests.slurm.rank RUN.yaml ...`: a rank as `palimpsest train` is one, which waits at a step to be hit.

`SLURM_TEST` names a folder. A rank that has done `HOLD_AT` steps or more makes a file `at-RANK.ATTEMPT` there and waits
once until `go` is there; a rank of the first attempt that finds `freeze-RANK` there stops itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engine import cli
from engine.train.trainer import Trainer


def main() -> int:
    folder, hold_at = Path(os.environ["SLURM_TEST"]), int(os.environ["HOLD_AT"])
    rank, attempt = os.environ["RANK"], os.environ["PALIMPSEST_ATTEMPT"]
    fit = Trainer.fit

    def fit_with_hold(trainer: Trainer) -> int:
        train, held = trainer.pipeline.train, False

        def train_with_hold(*arguments: Any) -> Any:
            nonlocal held
            if trainer.state.step >= hold_at and not held:
                held = True
                (folder / f"at-{rank}.{attempt}").touch()
                if attempt == "0" and (folder / f"freeze-{rank}").exists():
                    os.kill(os.getpid(), signal.SIGSTOP)
                while not (folder / "go").exists() and not trainer.requests.stop_requested:
                    time.sleep(0.05)
            return train(*arguments)

        vars(trainer.pipeline)["train"] = train_with_hold
        return fit(trainer)

    setattr(Trainer, "fit", fit_with_hold)  # noqa: B010
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
