"""Command lines that start the ranks of a run: pure functions from a `Wanted` and a `Node` to argv and environment.

`Wanted` is one attempt of a run on all its ranks, `Node` what one node has for those that it holds. Three kinds:
`local` (we start every rank ourselves), `deepspeed` and `torchrun` (they do). All of them end in the same `palimpsest
train RUN.yaml key=value...` on every rank. Only variables that a kind adds are named, so that a dry run prints a line
that a shell takes.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from engine.redact import redact
from launcher.environment import LOOPBACK
from launcher.variables import ATTEMPT, JOB, LAUNCHER, OVERRIDES, RUN_FOLDER

Kind = Literal["local", "deepspeed", "torchrun"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Wanted:
    """One attempt of a run, on however many nodes."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    """The run folder."""
    kind: Kind
    world_size: int
    job: str
    master_port: int
    master_addr: str = LOOPBACK
    attempt: int = 0


@dataclass(frozen=True)
class Node:
    """Ranks of an attempt on one node, with the devices and cores that they use."""

    ranks: range
    """Global numbers."""
    num_gpus: int = 0
    devices: tuple[str, ...] = ()
    """Names of the GPUs to use, as in CUDA_VISIBLE_DEVICES, one per rank; empty for all that are visible."""
    bus_order: bool = False
    """True if `devices` are numbers in the order of the bus, as nvidia-smi counts them."""
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
        """Return a line for a shell, without credentials."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        without = ["env", *(f"-u {name}" for name in self.dropped)] if self.dropped else []
        return redact(" ".join([*without, *variables, shlex.join(self.argv)]))

    def environment_in(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the whole environment of the process, where that of `palimpsest launch` is `environ`."""
        return {name: value for name, value in environ.items() if name not in self.dropped} | self.environment


def commands(wanted: Wanted, node: Node) -> list[Command]:
    """Return the commands that a node has to start: one per rank for `local`, one in all for the others."""
    if wanted.kind == "local":
        return [_local(wanted, node, local_rank) for local_rank in range(len(node.ranks))]
    return [_deepspeed(wanted, node) if wanted.kind == "deepspeed" else _torchrun(wanted, node)]


def _local(wanted: Wanted, node: Node, local_rank: int) -> Command:
    global_rank = node.ranks[local_rank]
    environment = _common(wanted, node) | {
        "RANK": str(global_rank),
        "WORLD_SIZE": str(wanted.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(len(node.ranks)),
        "MASTER_ADDR": wanted.master_addr,
        "MASTER_PORT": str(wanted.master_port),
    }
    # Unbuffered, so that what a rank printed before it was killed is in its log.
    argv = (node.python, "-u", "-m", *_train(wanted))
    return Command(f"rank-{global_rank}", argv, environment, _dropped(node, environment))


def _deepspeed(wanted: Wanted, node: Node) -> Command:
    """Return the command of deepspeed's runner, which starts ranks on this node alone.

    deepspeed drops CUDA_VISIBLE_DEVICES where it is told how many GPUs to use: it is told which ones instead. A
    hostfile that the system keeps in its usual place would take the ranks to other nodes, through ssh.
    """
    which = f"--num_gpus={len(node.ranks)}"
    if node.devices:
        which = f"--include=localhost:{','.join(node.devices)}"
    argv = (
        program("deepspeed", node.python),
        f"--hostfile={os.devnull}",
        which,
        f"--master_port={wanted.master_port}",
        "--log_level=warning",
        "--module",
        *_train(wanted),
    )
    environment = _common(wanted, node)
    # deepspeed ignores the variable beside `--include`, with a warning; its numbers are of all GPUs of the node.
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)
    dropped = (*(["CUDA_VISIBLE_DEVICES"] if visible else []), *_dropped(node, environment))
    if node.bus_order:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return Command("launcher", argv, environment, dropped)


def _torchrun(wanted: Wanted, node: Node) -> Command:
    """Return the command of a torchrun that starts ranks on this node alone."""
    argv = (
        program("torchrun", node.python),
        # Not `--standalone`, which would choose a port of its own.
        "--nnodes=1",
        "--node-rank=0",
        f"--nproc-per-node={len(node.ranks)}",
        f"--master-addr={wanted.master_addr}",
        f"--master-port={wanted.master_port}",
        "-m",
        *_train(wanted),
    )
    environment = _common(wanted, node)
    return Command("launcher", argv, environment, _dropped(node, environment))


def _train(wanted: Wanted) -> tuple[str, ...]:
    shown = () if _hides(wanted) else wanted.overrides
    return ("engine.cli", "train", str(wanted.config), *shown)


def _hides(wanted: Wanted) -> bool:
    """Return True if overrides hold credentials; then none is on the command line, for their order matters."""
    return any(redact(override) != override for override in wanted.overrides)


def _dropped(node: Node, environment: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in node.left_over if name not in environment)


def _common(wanted: Wanted, node: Node) -> dict[str, str]:
    """Return the variables that every kind of launcher gets."""
    environment = {
        JOB: wanted.job,
        ATTEMPT: str(wanted.attempt),
        LAUNCHER: wanted.kind,
        RUN_FOLDER: str(wanted.folder.absolute()),
        # Each rank would start a thread per core of the node; on a CPU that many ranks slow each other down.
        "OMP_NUM_THREADS": str(max(node.num_cores // len(node.ranks), 1)),
    }
    if _hides(wanted):
        environment[OVERRIDES] = json.dumps(wanted.overrides)
    if node.num_gpus == 0:
        # Without it deepspeed's launcher looks for a GPU and gives up.
        environment["DS_ACCELERATOR"] = "cpu"
    elif node.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(node.devices)
    return environment


def program(name: str, python: str) -> str:
    """Return the path of a program beside the interpreter, so that no other environment's is taken."""
    beside = Path(python).parent / name
    # "python" alone has no folder; its programs are then found on PATH, as it is.
    return str(beside) if beside.is_absolute() else name
