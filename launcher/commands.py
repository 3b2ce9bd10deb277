"""Command lines that start the ranks of a run on this node: pure functions from what is wanted to argv and environment.

Three kinds: `local` (we start every rank ourselves), `deepspeed` and `torchrun` (they do). All of them end in the same
`palimpsest train RUN.yaml key=value...` on every rank. Only variables that a kind adds are named, so that a dry run
prints a line that a shell takes.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from launcher.environment import ATTEMPT, JOB, LAUNCHER, RUN_FOLDER

Kind = Literal["local", "deepspeed", "torchrun"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Wanted:
    """What is to be started on this node."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    """The run folder."""
    kind: Kind
    num_processes: int
    job: str
    master_port: int
    attempt: int = 0
    num_gpus: int = 0
    devices: tuple[str, ...] = ()
    """Names of the GPUs to use, as in CUDA_VISIBLE_DEVICES, one per rank; empty for all that are visible."""
    bus_order: bool = False
    """Whether `devices` are numbers in the order of the bus, as nvidia-smi counts them."""
    left_over: tuple[str, ...] = ()
    """Variables in the environment of `palimpsest launch` that the ranks must not see."""
    num_cores: int = 1
    python: str = "python"
    """The interpreter; the launchers' own programs are taken from its folder by `program`."""


@dataclass(frozen=True)
class Command:
    """One process to start: its arguments, and the variables added to the environment of `palimpsest launch`."""

    name: str
    """`rank-N` or `launcher`: names its log."""
    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    """Variables that are taken out of it before."""

    def __str__(self) -> str:
        """A line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        without = ["env", *(f"-u {name}" for name in self.dropped)] if self.dropped else []
        return " ".join([*without, *variables, shlex.join(self.argv)])

    def environment_in(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the process, where that of `palimpsest launch` is `environ`."""
        return {name: value for name, value in environ.items() if name not in self.dropped} | self.environment


def commands(wanted: Wanted) -> list[Command]:
    """What to start: one command per rank for `local`, one in all for the others."""
    if wanted.kind == "local":
        return [_local(wanted, rank) for rank in range(wanted.num_processes)]
    return [_deepspeed(wanted) if wanted.kind == "deepspeed" else _torchrun(wanted)]


def _local(wanted: Wanted, global_rank: int) -> Command:
    environment = _common(wanted) | {
        "RANK": str(global_rank),
        "WORLD_SIZE": str(wanted.num_processes),
        "LOCAL_RANK": str(global_rank),
        "LOCAL_WORLD_SIZE": str(wanted.num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(wanted.master_port),
    }
    argv = (wanted.python, "-u", "-m", *_train(wanted))
    return Command(f"rank-{global_rank}", argv, environment, _dropped(wanted, environment))


def _deepspeed(wanted: Wanted) -> Command:
    """deepspeed drops CUDA_VISIBLE_DEVICES where it is told how many GPUs to use: it is told which ones instead.

    A hostfile that the system keeps in its usual place would take the ranks to other nodes, through ssh.
    """
    which = f"--num_gpus={wanted.num_processes}"
    if wanted.devices:
        which = f"--include=localhost:{','.join(wanted.devices)}"
    argv = (
        program("deepspeed", wanted.python),
        f"--hostfile={os.devnull}",
        which,
        f"--master_port={wanted.master_port}",
        "--log_level=warning",
        "--module",
        *_train(wanted),
    )
    environment = _common(wanted)
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)
    dropped = (*(["CUDA_VISIBLE_DEVICES"] if visible else []), *_dropped(wanted, environment))
    if wanted.bus_order:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return Command("launcher", argv, environment, dropped)


def _torchrun(wanted: Wanted) -> Command:
    argv = (
        program("torchrun", wanted.python),
        "--nnodes=1",
        "--node-rank=0",
        f"--nproc-per-node={wanted.num_processes}",
        "--master-addr=127.0.0.1",
        f"--master-port={wanted.master_port}",
        "-m",
        *_train(wanted),
    )
    environment = _common(wanted)
    return Command("launcher", argv, environment, _dropped(wanted, environment))


def _train(wanted: Wanted) -> tuple[str, ...]:
    return ("engine.cli", "train", str(wanted.config), *wanted.overrides)


def _dropped(wanted: Wanted, environment: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in wanted.left_over if name not in environment)


def _common(wanted: Wanted) -> dict[str, str]:
    """Variables of every kind. Without a GPU DeepSpeed is told so, or its launcher looks for one and gives up."""
    environment = {
        JOB: wanted.job,
        ATTEMPT: str(wanted.attempt),
        LAUNCHER: wanted.kind,
        RUN_FOLDER: str(wanted.folder.absolute()),
        "OMP_NUM_THREADS": str(max(wanted.num_cores // wanted.num_processes, 1)),
    }
    if wanted.num_gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    elif wanted.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(wanted.devices)
    return environment


def program(name: str, python: str) -> str:
    """The launcher's program beside the interpreter, so that no other environment's is taken."""
    beside = Path(python).parent / name
    return str(beside) if beside.is_absolute() else name
