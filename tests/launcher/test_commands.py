"""Golden command lines."""

from dataclasses import replace
from pathlib import Path

from launcher.commands import Wanted, commands

WANTED = Wanted(
    config=Path("my runs/gpt.yaml"),
    overrides=("parallel.pipe=2", "name='x y'"),
    folder=Path("/runs/x"),
    kind="local",
    num_processes=2,
    job="job-1",
    master_port=4321,
    num_cores=5,
    python="/venv/bin/python",
)
COMMON = (
    "PALIMPSEST_JOB=job-1 PALIMPSEST_ATTEMPT=0 PALIMPSEST_LAUNCHER={} PALIMPSEST_RUN_FOLDER=/runs/x "
    "OMP_NUM_THREADS=2 DS_ACCELERATOR=cpu "
)
TRAIN = "engine.cli train 'my runs/gpt.yaml' parallel.pipe=2 'name='\"'\"'x y'\"'\"''"


def test_local_starts_every_rank_as_torchrun_would() -> None:
    lines = [str(command) for command in commands(WANTED)]
    assert lines == [
        COMMON.format("local")
        + f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4321 "
        + f"/venv/bin/python -u -m {TRAIN}"
        for rank in range(2)
    ]
    assert [command.name for command in commands(WANTED)] == ["rank-0", "rank-1"]


def test_deepspeed() -> None:
    (command,) = commands(replace(WANTED, kind="deepspeed"))
    assert str(command) == (
        COMMON.format("deepspeed")
        + f"/venv/bin/deepspeed --num_gpus=2 --master_port=4321 --log_level=warning --module {TRAIN}"
    )
    assert command.name == "launcher"


def test_torchrun() -> None:
    (command,) = commands(replace(WANTED, kind="torchrun"))
    assert str(command) == (
        COMMON.format("torchrun")
        + f"/venv/bin/torchrun --nproc-per-node=2 --master-addr=127.0.0.1 --master-port=4321 -m {TRAIN}"
    )


def test_with_gpus_the_accelerator_is_left_to_deepspeed() -> None:
    (command,) = commands(replace(WANTED, kind="deepspeed", num_gpus=8))
    assert "DS_ACCELERATOR" not in command.environment


def test_more_ranks_than_cores_still_get_a_thread() -> None:
    assert commands(replace(WANTED, num_processes=16))[0].environment["OMP_NUM_THREADS"] == "1"


def test_an_interpreter_without_a_folder_takes_the_launcher_on_the_path() -> None:
    assert commands(replace(WANTED, kind="torchrun", python="python3"))[0].argv[0] == "torchrun"
