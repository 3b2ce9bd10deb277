"""One run under `palimpsest launch --restarts`, hit by every kind of fault in turn, against the run nobody disturbed.

The ranks are real ones, the faults real ones, too: signals, an exception, memory and disk space that the kernel
refuses. The step limit of the watchdog is far above the time of a step (tenths of a second on a busy machine).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import outcome
from engine.config.load import merge
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS, BATCH, SAVE_EVERY = 44, 12, 4
LAUNCH = """
import sys
from engine import cli
from launcher import commands
before = commands._train
commands._train = lambda wanted: ("tests.chaos.rank", *before(wanted)[1:])
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command `palimpsest`, whose ranks are those of `tests.chaos.rank`."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def tree(corpus: Path, folder: Path, num_steps: int = NUM_STEPS, **changes: Any) -> dict[str, Any]:
    stage = run_tree(corpus, folder)["stages"][0] | {"global_batch_size": BATCH, "duration": {"steps": num_steps}}
    ordinary = run_tree(
        corpus,
        folder,
        stages=[stage],
        model={"bias": False},
        optimizer={"learning_rate": 1e-3},
        parallel={"zero_stage": 2, "micro_batch_size": 2},
        evaluation={"every_steps": None, "max_samples": 4},
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": 2},
        launch={"step_limit_seconds": 20.0, "step_limit_factor": 10.0, "start_limit_seconds": 240.0},
        logging={"tensorboard": True},
        checks=False,
    )
    return merge(ordinary, changes)


def launch(
    corpus: Path,
    folder: Path,
    ranks: int,
    restarts: int,
    *faults: dict[str, Any] | None,
    launcher: str = "local",
    **changes: Any,
) -> tuple[int, str]:
    """Exit code of the launch, and what it said on standard error."""
    path = folder / "RUN.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree(corpus, folder / "run", **changes)))
    foreign = ("SLURM_", "OMPI_", "PMI_", "PALIMPSEST_", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "CHAOS": json.dumps(faults)}
    options = ["--processes", str(ranks), "--restarts", str(restarts), "--launcher", launcher]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, "launch", str(path), *options],
        cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def fault(what: str, rank: int, step: int) -> dict[str, Any]:
    return {"what": what, "rank": rank, "step": step}


def said(stderr: str) -> list[str]:
    return re.findall(r"^palimpsest launch: (.*)$", stderr, re.MULTILINE)


def check(corpus: Path, folder: Path, ranks: int, num_steps: int, expected: list[str], *faults: dict[str, Any]) -> None:
    """Hit a run by these faults in turn: each is told, and the numbers are those of the run nobody disturbed.

    One of them stops a rank.
    """
    run = folder / "supervised" / "run"
    code, stderr = launch(corpus, folder / "supervised", ranks, len(faults), *faults, None, num_steps=num_steps)
    assert code == EXIT_DONE, stderr
    found = said(stderr)
    assert len(found) == len(expected), stderr
    for pattern, words in zip(expected, found, strict=True):
        assert re.match(pattern, words), (pattern, words)
    [hang] = (run / "logs").glob("hang-*.txt")
    stacks = hang.read_text()
    assert "stop (tests/chaos/rank.py:" in stacks
    assert "engine/train/trainer.py" in stacks

    whole = folder / "undisturbed"
    run_ranks(2, train_rank, tree(corpus, whole, num_steps))
    losses = [[record["loss"] for record in read_metrics(each) if "loss" in record] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(range(1, num_steps + 1))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, num_steps + 1))
    ended = outcome.read(run)
    assert ended is not None
    assert (ended.code, ended.attempt, ended.step) == (EXIT_DONE, len(faults), num_steps)


@pytest.mark.timeout(900)
def test_a_run_outlives_a_rank_that_hangs_and_memory_that_is_refused(corpus, tmp_path):
    expected = [
        r"failed: rank 1 hangs: silent for \d+ s in step 6 \(forward and backward\), its process is stopped "
        r"\(SIGSTOP\), in stop \(tests/chaos/rank.py:\d+\); rank 0 waits in \w+; all stacks: .*hang-.*\.0\.txt",
        r"restart 1 of 2 on 1 ranks \(pipe 1 x data 1 .*",
        r"failed at step 9: rank 0 (first: rank 0 )?is out of memory in step 10: .*",
        r"restart 2 of 2 on 1 ranks",
    ]
    check(corpus, tmp_path, 2, 12, expected, fault("stop", 1, 5), fault("memory", 0, 9))


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_run_outlives_every_kind_of_fault(corpus, tmp_path):
    expected = [
        r"failed: rank 2 was killed by SIGKILL in step 7 \(forward and backward\).*",
        r"restart 1 of 5 on 2 ranks \(pipe 1 x data 2 .*",
        r"failed at step 11: rank 1 first: ArithmeticError: a fault of our own",
        r"restart 2 of 5 on 2 ranks",
        r"failed at step 14: rank 0 (first: rank 0 )?is out of memory in step 15: .*",
        r"restart 3 of 5 on 2 ranks",
        r"failed at step \d+: rank 1: .*[Ff]ile too large.*",
        r"restart 4 of 5 on 2 ranks",
        r"failed: rank 1 hangs: silent for \d+ s in step 31 \(forward and backward\), its process is stopped "
        r"\(SIGSTOP\), in stop \(tests/chaos/rank.py:\d+\); rank 0 waits in \w+; all stacks: .*hang-.*\.4\.txt",
        r"restart 5 of 5 on 1 ranks \(pipe 1 x data 1 .*",
    ]
    faults = [fault("kill", 2, 6), fault("fail", 1, 11), fault("memory", 0, 14), fault("disk", 1, 17)]
    check(corpus, tmp_path, 3, NUM_STEPS, expected, *faults, fault("stop", 1, 30))


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["kill", "stop"])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_other_launchers_lose_a_rank_and_go_on(launcher, what, corpus, tmp_path):
    """A launcher between us and the ranks ends them in its own way and loses the exit code."""
    code, stderr = launch(corpus, tmp_path, 2, 1, fault(what, 1, 20), None, launcher=launcher)
    assert code == EXIT_DONE, stderr
    first, again = said(stderr)
    assert re.match(r"failed.*rank 1 (was gone already|hangs: .* its process is stopped)", first), first
    assert again.startswith("restart 1 of 1 on 1 ranks (pipe 1 x data 1 ")
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record] == list(
        range(1, NUM_STEPS + 1)
    )


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_any_layout_takes_every_rank_that_is_left(corpus, tmp_path):
    """Four ranks as pipe 2 x tensor 2 have no smaller world on the data axis; with `elastic.layout: any` the run goes
    on in another layout on all that remain, from the node's memory: nothing of it was ever on a disk."""
    memory = tmp_path / "memory"
    memory.mkdir()
    grid = {"pipe": 2, "tensor": 2, "zero_stage": 2}
    code, stderr = launch(
        corpus, tmp_path, 4, 2, fault("kill", 3, 15), fault("kill", 1, 30), None,
        parallel=grid, elastic={"layout": "any"}, model={"num_layers": 4},
        checkpoint={"every_steps": None, "memory": {"every_steps": 1, "folder": str(memory)}},
    )  # fmt: skip
    assert code == EXIT_DONE, stderr
    lost, on_three, lost_again, on_two = said(stderr)
    assert lost.startswith("failed: rank 3 was killed by SIGKILL in step 16 ")
    assert on_three.startswith("restart 1 of 2 on 3 ranks (")
    assert lost_again.startswith("failed: rank 1 was killed by SIGKILL in step 31 ")
    assert on_two.startswith("restart 2 of 2 on 2 ranks (")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    resumed = re.findall(r"resuming from (\S+)/step-(\d+): .*saved in (layout .+), going on in (layout .+)", log)
    (_, _, at_first, then), (_, _, still, in_the_end) = resumed
    assert at_first.startswith("layout pipe 2 x data 1 x sequence 1 x tensor 2, ZeRO-2")
    assert then == still
    assert len({at_first, then, in_the_end}) == 3, "three worlds, three layouts"
    for (place, step, *_), earlier, died_after in zip(resumed, (0, 15), (15, 30), strict=True):
        assert place.startswith(str(memory))
        assert earlier < int(step) <= died_after
    assert list(memory.iterdir()) == [], "given back at the end"

    whole = tmp_path / "undisturbed"
    run_ranks(1, train_rank, tree(corpus, whole, model={"num_layers": 4}))
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert len(losses[0]) == NUM_STEPS
