"""A run that loses a whole node goes on from the memory of the others, as if nothing had been.

Two nodes are played by four ranks on one machine, each with a folder of its own. A node is lost with everything: its
processes by SIGKILL, its memory with its folder. On the same layout the losses after the restart are those of the run
nobody disturbed, bit for bit. What is opened is watched by Python's audit events and not by the code under test.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import Owner, acquire, committed, step_of
from engine.checkpoint.node_memory.node_folder import folder_of
from engine.config.rank_environment import RankEnvironment
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

NUM_STEPS, SAVE_EVERY, DIES_AFTER = 9, 4, 7
JOB = "played"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def tree(corpus: Path, folder: Path, memory: Path | None, **parallel: int) -> dict[str, Any]:
    return run_tree(
        corpus,
        folder,
        parallel=parallel,
        evaluation={"every_steps": None, "max_samples": 4},
        checkpoint={
            "every_steps": SAVE_EVERY,
            "memory": {"every_steps": 1, "folder": str(memory)} if memory else None,
        },
        checks=False,
    )


def on_nodes(
    environment: RankEnvironment,
    config: dict[str, Any],
    attempt: int,
    dies: int | None,
    disk: Path,
    goes_back: bool = False,
) -> dict[str, Any]:
    """One rank of a run on nodes of two ranks; `dies`: the node that is lost after `DIES_AFTER` steps, or, with
    `goes_back`, once it has gone back to the disk as after spikes.

    Every generation is whole before the next step, so that it is known which one is the newest.
    """
    node = environment.global_rank // 2
    environment = replace(environment, node_rank=node, local_rank=environment.global_rank % 2, job=JOB, attempt=attempt)
    opened: list[str] = []
    trainers: list[Any] = []
    sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == "open" else None)

    def prepare(trainer: Any) -> None:
        train = trainer.pipeline.train

        def settle_and_train(*arguments: Any) -> Any:
            trainer.checkpoints.settle()
            if trainer.state.step == DIES_AFTER and node == dies:
                if goes_back:
                    restored = trainer.checkpoints.restore(
                        trainer.pipeline.engine, trainer.current.engine_of, go_back=True
                    )
                    assert restored is not None
                    assert restored.state.step == SAVE_EVERY
                os.kill(os.getpid(), signal.SIGKILL)
            return train(*arguments)

        vars(trainer.pipeline)["train"] = settle_and_train
        opened.append("the first step")
        trainers.append(trainer)

    result = train_rank(environment, config, prepare)
    trainers[0].checkpoints.end(trainers[0].state)  # as `train` does
    at_start = opened[: opened.index("the first step")]
    return result | {"read": [path for path in at_start if path.startswith(str(disk)) and "stage-" in path]}


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.matrix)])
def test_a_run_outlives_a_node_without_the_disk(corpus, tmp_path, zero_stage):
    whole, run, memory = tmp_path / "whole", tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    layout = {"pipe": 2, "data": 2, "zero_stage": zero_stage}
    run_ranks(4, train_rank, tree(corpus, whole, None, **layout))
    one = partial(on_nodes, config=tree(corpus, run, memory, **layout), disk=run)
    with pytest.raises(RankFailed):
        run_ranks(4, partial(one, attempt=0, dies=1))
    shutil.rmtree(folder_of(memory, run, 1))
    assert [step_of(path) for path in committed(run / "checkpoints")] == [SAVE_EVERY]
    ranks = run_ranks(4, partial(one, attempt=1, dies=None))
    assert {(rank["started_at"], rank["code"]) for rank in ranks} == {(DIES_AFTER, EXIT_DONE)}
    assert [path for rank in ranks for path in rank["read"]] == [], "no file of a checkpoint on the disk was opened"
    assert losses(run) == losses(whole)
    assert os.listdir(memory) == [], "given back at the end"


@pytest.mark.parametrize("harm", ["damage", "rollback", pytest.param("another job between", marks=pytest.mark.matrix)])
def test_memory_that_cannot_be_gone_on_from_falls_back_to_the_disk(corpus, tmp_path, harm):
    run, memory = tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    one = partial(on_nodes, config=tree(corpus, run, memory), disk=run)
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(1, partial(one, attempt=0, dies=0, goes_back=harm == "rollback"))
    kept = [step_of(path) for path in committed(folder_of(memory, run, 0))]
    assert kept[:1] == ([] if harm == "rollback" else [DIES_AFTER])
    if harm == "another job between":
        acquire(run / "checkpoints", Owner("another", 0))
    elif harm == "damage":
        for path in memory.glob("*/step-*/stage-*"):  # also the generation before, if its dropping was cut short
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
    (rank,) = run_ranks(1, partial(one, attempt=1, dies=None))
    assert (rank["started_at"], rank["code"]) == (SAVE_EVERY, EXIT_DONE)
    assert rank["read"] != []
    assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
