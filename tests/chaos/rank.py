"""`python -m tests.chaos.rank train RUN.yaml ...`: a rank as `palimpsest train` is one, with a fault built in.

`CHAOS` holds a JSON list with one fault per attempt: {"rank", "step", "what"}, or null for none. The fault strikes
that rank when it has done so many steps or more, in the forward pass of the next one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from engine import cli
from engine.train.trainer import Trainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ArithmeticError("a fault of our own")


def memory() -> None:
    """Asks for more than the address space that the kernel still allows."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    torch.zeros(1 << 36, dtype=torch.uint8)


def disk() -> None:
    """From now on the kernel refuses to let a file grow beyond a few blocks: the next checkpoint does not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[], None]] = {"kill": kill, "stop": stop, "fail": fail, "memory": memory, "disk": disk}


def main() -> int:
    faults = json.loads(os.environ["CHAOS"])
    fault = faults[int(os.environ.get("PALIMPSEST_ATTEMPT", 0))]
    if fault is not None and fault["rank"] == int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]):
        fit = Trainer.fit

        def fit_with_fault(trainer: Trainer) -> int:
            train = trainer.pipeline.train
            struck = False

            def train_with_fault(*arguments: Any) -> Any:
                nonlocal struck
                if trainer.state.step >= fault["step"] and not struck:
                    struck = True
                    FAULTS[fault["what"]]()
                return train(*arguments)

            vars(trainer.pipeline)["train"] = train_with_fault
            return fit(trainer)

        setattr(Trainer, "fit", fit_with_fault)  # noqa: B010
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
