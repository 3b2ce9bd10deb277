"""One rank of a run from start to end: meet the other ranks, train, report the outcome."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import torch

from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import Layout
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, CheckpointError, EnvironmentProblem, PalimpsestError
from engine.heartbeat import Heartbeat
from engine.logs import logger, phase
from engine.outcome import Outcome
from engine.parallel import collectives, zero
from engine.parallel.axes import Axis
from engine.parallel.collectives import barrier
from engine.parallel.groups import Group, Groups, connect, disconnect
from engine.parallel.meeting import agree
from engine.parallel.nodes import Nodes
from engine.run_folder import RunFolder
from engine.train.build import join_groups
from engine.train.facts import facts_of_start, gpu_of
from engine.train.failures import LostNeighbour, translate_error
from engine.train.predictions import Measure
from engine.train.signals import StopSignals
from engine.train.trainer import Trainer

_log = logger(__name__)
LOST_RANK_FIRST_SECONDS = 2.0
"""Seconds in which the watcher of a rank that was lost may name it, before a neighbour says that it lost one."""


def train(
    config: RunConfig,
    layout: Layout,
    environment: RankEnvironment,
    signals: StopSignals,
    heart: Heartbeat,
    folder: RunFolder,
    measure: Measure | None = None,
) -> int:
    """Train to the end of the run, or until a signal; return the exit code. Every rank of the world calls it.

    Rank 0, or its supervisor, has taken `folder`, the run folder. `measure` measures the predictions of the run's task.

    Raises:
        PalimpsestError: what a user can mend; checkpoints that were committed stay whole.
    """
    device = choose_device(environment)
    with phase(f"meeting {environment.world_size - 1} other ranks"):
        meet(config, environment, device, folder)
    with phase("starting DeepSpeed"):
        zero.start(device)
    with phase("making the groups of ranks"):
        groups = join_groups(config, layout, environment.global_rank)
        warn_of_split_groups(groups, environment)
    trainer = None
    try:
        trainer = Trainer(config, groups, environment, device, signals, heart, measure)
        code = trainer.fit()
        trainer.checkpoints.end(trainer.state)
        if environment.global_rank == 0:
            step, early = trainer.state.step, code == EXIT_DONE and trainer.ends_early
            folder.note(Outcome(environment.job, environment.attempt, code, step, early=early))
        barrier(groups.world)  # no rank leaves before the outcome stands: launchers signal the others when one ends
    except Exception as error:
        step = trainer.state.step if trainer is not None else 0
        told = translate_error(error, environment.global_rank, step)
        _note_failure(folder, environment, step, told)
        if trainer is not None and isinstance(error, PalimpsestError):
            with contextlib.suppress(CheckpointError):  # raised on every rank or on none: what was trained is not lost
                trainer.checkpoints.settle()
        # An error that was ours already keeps its own cause: it cannot be the cause of itself.
        raise told from (error if told is not error else error.__cause__)
    finally:
        if trainer is not None:
            trainer.close()
    if trainer is not None and trainer.is_main_rank:
        with contextlib.suppress(OSError):  # words that nobody can read must not cost a run that has ended well
            print(trainer.summary(code), flush=True)
    disconnect()
    return code


def meet(config: RunConfig, environment: RankEnvironment, device: torch.device, folder: RunFolder) -> None:
    """Meet the other ranks, and end together with them where they were started differently.

    Raises:
        Disagreement: ranks differ in what all must have in common.
        EnvironmentProblem: they did not all arrive.
    """
    limit_seconds = config.launch.collective_limit_seconds
    facts = facts_of_start(config, environment, device)

    def compare(store: Any) -> None:
        agree(store, environment.global_rank, environment.world_size, facts, limit_seconds, gpu_of(device))

    # Compared over the store, before a process group exists: ranks that were started with other layouts would wait
    # for each other in the first collective until its timeout.
    connect(environment, device, limit_seconds=limit_seconds, agree=compare)
    folder.met = True


def warn_of_split_groups(groups: Groups, environment: RankEnvironment) -> None:
    """Warn once where ranks that exchange activations in every layer are on different nodes. Collective over the world.

    Tensor groups are neighbours in rank order, and so are those of the sequence axis: they share a node unless the
    launcher deals ranks out in turn, or a group is larger than a node.
    """
    axes: dict[Axis, Group] = {"tensor": groups.tensor, "sequence": groups.sequence}
    # Equal on all ranks, unlike the number of nodes that a launcher tells a rank.
    if all(group.size == 1 for group in axes.values()):
        return
    nodes = Nodes.of(collectives.gather_objects((socket.gethostname(), environment.node_rank), groups.world))
    if environment.global_rank > 0:
        return
    for axis, group in axes.items():
        lines = groups.grid.groups(axis)
        split = nodes.split(lines)
        if split:
            _log.warning(
                "%d of %d groups of the %s axis are on several nodes (ranks %s): each layer waits for the network; "
                "number the ranks node by node (srun --distribution=block, mpirun --map-by ppr:N:node), and keep "
                "parallel.%s = %d within a node",
                len(split), len(lines), axis, ", ".join(map(str, split[0])), axis, group.size,
            )  # fmt: skip


def _note_failure(folder: RunFolder, environment: RankEnvironment, step: int, error: Exception) -> None:
    if isinstance(error, LostNeighbour):
        folder.wait_for_failure(LOST_RANK_FIRST_SECONDS)
    ours = isinstance(error, PalimpsestError)
    code, words = (error.exit_code, str(error)) if ours else (EXIT_FAILURE, f"{type(error).__name__}: {error}")
    folder.note_failure(Outcome(environment.job, environment.attempt, code, step, environment.global_rank, words))


def choose_device(environment: RankEnvironment) -> torch.device:
    """Return this rank's GPU, or the CPU where there is none or DeepSpeed is told to use it (DS_ACCELERATOR=cpu).

    Clusters show a task either all GPUs of its node or its own alone, which then has index 0.

    Raises:
        EnvironmentProblem: the node has several GPUs, and fewer than ranks.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if environment.local_rank >= count > 1:
        raise EnvironmentProblem(
            f"local rank {environment.local_rank} of {environment.local_world_size} sees {count} GPUs",
            f"at most {count} ranks on this node, or one visible GPU for each",
            "start fewer ranks, or look at CUDA_VISIBLE_DEVICES",
        )
    # One visible GPU: the cluster has given each task its own, and all of them call it 0.
    index = environment.local_rank if count > 1 else 0
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes its device from there
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
