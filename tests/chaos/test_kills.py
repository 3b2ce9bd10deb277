"""SIGKILL of a random rank at random moments during saves: something always loads, and at most one interval is lost."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed, step_of
from engine.checkpoint.retention import newest_whole
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.chaos.writers import Kill, drive
from tests.distributed.ranks import _in_connected_world, _rank, _server, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

SEED = 20
PATIENCE_SECONDS = 120.0


@pytest.mark.parametrize("number", [40, pytest.param(100, marks=pytest.mark.matrix)])
def test_kills_of_writers_leave_what_loads(tmp_path, number):
    receiver, sender = _server.Pipe(duplex=False)
    process: Any = _server.Process(target=drive, args=(sender, tmp_path, number, SEED), daemon=False)
    process.start()
    sender.close()
    kills: list[Kill] = []
    try:
        while len(kills) < number:
            assert receiver.poll(PATIENCE_SECONDS), f"nothing within {PATIENCE_SECONDS} s after {len(kills)} kills"
            kill = receiver.recv()
            assert isinstance(kill, Kill), kill
            kills.append(kill)
    finally:
        process.kill()
        process.join()
    for kill in kills:
        assert kill.found >= kill.known, f"a checkpoint that was committed is gone: {kill}"
        assert kill.found >= kill.begun - 1, f"more than one interval is lost: {kill}"
        strange = [name for name in kill.others if not re.fullmatch(r"owner\.json|\.owner.*|\.step-.*", name)]
        assert not strange, kill
    torn = sum(any(".partial" in name for name in kill.others) for kill in kills)
    assert torn > 0, "some kills fell while files were being written"
    assert any(kill.found == kill.begun for kill in kills), "and some after the commit"


LAYOUTS = (
    {"zero_stage": 1, "data": 2},
    {"zero_stage": 3, "pipe": 2},
    {"zero_stage": 2, "tensor": 2},
    {"zero_stage": 3, "data": 2},
    {"zero_stage": 1, "pipe": 2},
)
"""Layouts that the run goes on in, one after the other."""


def run_with_kills(corpus: Path, folder: Path, kills: int, seed: int) -> None:
    """A run that saves after every step; each time one of its ranks is killed during a save it goes on elsewhere."""
    draw, checkpoints, found = random.Random(seed), folder / "checkpoints", 0
    stage = run_tree(corpus, folder)["stages"][0]
    changes = {
        "stages": [stage | {"duration": {"steps": 3 * kills + 3}}],
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "evaluation": {"every_steps": None},
        "checks": False,
    }
    for number in range(kills):
        tree = run_tree(corpus, folder, parallel=LAYOUTS[number % len(LAYOUTS)], **changes)
        begun = kill_one(tree, folder, checkpoints, fatal=found + draw.randint(1, 3), draw=draw)
        newest = newest_whole(committed(checkpoints))
        left = step_of(newest) if newest else 0
        assert left >= max(begun - 1, found), f"kill {number}: step {begun} was being saved, {left} was left"
        found = left
    ranks = run_ranks(2, train_rank, run_tree(corpus, folder, parallel=LAYOUTS[kills % len(LAYOUTS)], **changes))
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    assert ranks[0]["started_at"] == found
    steps = [record["step"] for record in read_metrics(folder)]
    assert steps[-1] == 3 * kills + 3
    assert len(set(steps)) == len([record for record in read_metrics(folder) if "loss" in record])


def kill_one(tree: dict[str, Any], folder: Path, checkpoints: Path, fatal: int, draw: random.Random) -> int:
    """Starts two ranks, kills one a random time after the save of step `fatal` has begun, then the other; returns the
    newest step whose save had begun."""
    store = folder.parent / f"store-{fatal}-{draw.random()}"
    store.mkdir(parents=True)
    pipes = [_server.Pipe(duplex=False) for _ in range(2)]
    processes: list[Any] = [
        _server.Process(
            target=_rank, args=(pipes[rank][1], store, rank, 2, _in_connected_world, (train_rank, (tree,))), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while newest_begun(checkpoints) < fatal:
            assert all(process.is_alive() for process in processes), f"a rank ended before the save of step {fatal}"
            assert time.monotonic() < until, f"the save of step {fatal} did not begin within {PATIENCE_SECONDS} s"
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.05))
        draw.shuffle(processes)
        processes[0].kill()
        processes[0].join()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return newest_begun(checkpoints)


def newest_begun(checkpoints: Path) -> int:
    """The newest step that is being saved or was saved, by the names in the folder."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    return max((int(found.group(1)) for name in names if (found := re.match(r"\.?step-(\d+)", name))), default=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def test_a_run_outlives_kills_during_its_saves(corpus, tmp_path):
    run_with_kills(corpus, tmp_path / "run", kills=3, seed=SEED)


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_outlives_a_hundred_kills(corpus, tmp_path, seed):
    run_with_kills(corpus, tmp_path / "run", kills=20, seed=seed)
