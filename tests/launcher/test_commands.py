"""Golden command lines, and what the launchers' own parsers make of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.commands import KINDS, Kind, Node, Wanted, commands
from launcher.left_over import left_over

WANTED = Wanted(
    config=Path("my runs/gpt.yaml"),
    overrides=("parallel.pipe=2", "name='x y'"),
    folder=Path("/runs/x"),
    kind="local",
    world_size=2,
    job="job-1",
    master_port=4321,
)
NODE = Node(ranks=range(2), num_cores=5, python="/venv/bin/python")
COMMON = (
    "PALIMPSEST_JOB=job-1 PALIMPSEST_ATTEMPT=0 PALIMPSEST_LAUNCHER={} PALIMPSEST_RUN_FOLDER=/runs/x "
    "OMP_NUM_THREADS=2 DS_ACCELERATOR=cpu "
)
TRAIN = "engine.cli train 'my runs/gpt.yaml' parallel.pipe=2 'name='\"'\"'x y'\"'\"''"


def test_local_starts_every_rank_as_torchrun_would() -> None:
    lines = [str(command) for command in commands(WANTED, NODE)]
    assert lines == [
        COMMON.format("local")
        + f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4321 "
        + f"/venv/bin/python -u -m {TRAIN}"
        for rank in range(2)
    ]
    assert [command.name for command in commands(WANTED, NODE)] == ["rank-0", "rank-1"]


def test_deepspeed() -> None:
    (command,) = commands(replace(WANTED, kind="deepspeed"), NODE)
    assert str(command) == (
        COMMON.format("deepspeed")
        + "/venv/bin/deepspeed --hostfile=/dev/null --num_gpus=2 --master_port=4321 --log_level=warning --module "
        + TRAIN
    )
    assert command.name == "launcher"


def test_torchrun() -> None:
    (command,) = commands(replace(WANTED, kind="torchrun"), NODE)
    assert str(command) == (
        COMMON.format("torchrun")
        + "/venv/bin/torchrun --nnodes=1 --node-rank=0 --nproc-per-node=2 --master-addr=127.0.0.1 --master-port=4321 "
        + f"-m {TRAIN}"
    )


def test_with_gpus_the_accelerator_is_left_to_deepspeed() -> None:
    (command,) = commands(replace(WANTED, kind="deepspeed"), replace(NODE, num_gpus=8))
    assert "DS_ACCELERATOR" not in command.environment


def test_more_ranks_than_cores_still_get_a_thread() -> None:
    first, *_ = commands(replace(WANTED, world_size=16), replace(NODE, ranks=range(16)))
    assert first.environment["OMP_NUM_THREADS"] == "1"


def test_a_node_starts_its_own_ranks_of_a_larger_world() -> None:
    wanted = replace(WANTED, world_size=6, master_addr="node1")
    found = [command.environment for command in commands(wanted, replace(NODE, ranks=range(2, 5)))]
    assert [environment["RANK"] for environment in found] == ["2", "3", "4"]
    assert [environment["LOCAL_RANK"] for environment in found] == ["0", "1", "2"]
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) for one in found} == {("6", "3", "node1")}


def test_an_interpreter_without_a_folder_takes_the_launcher_on_the_path() -> None:
    assert commands(replace(WANTED, kind="torchrun"), replace(NODE, python="python3"))[0].argv[0] == "torchrun"


def test_deepspeed_is_told_which_gpus_and_reads_no_hostfile_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.launcher import runner

    monkeypatch.setattr(runner, "DLTS_HOSTFILE", str(tmp_path / "hostfile"))
    (tmp_path / "hostfile").write_text("other-node slots=8\n")
    (command,) = commands(replace(WANTED, kind="deepspeed"), replace(NODE, num_gpus=2, devices=("2", "3")))
    arguments = runner.parse_args(list(command.argv[1:]))
    assert runner.fetch_hostfile(arguments.hostfile) is None
    assert runner.parse_inclusion_exclusion({"localhost": 8}, arguments.include, "") == {"localhost": [2, 3]}
    assert arguments.num_gpus == -1, "beside --include it is refused"
    assert "CUDA_VISIBLE_DEVICES" not in command.environment_in({"CUDA_VISIBLE_DEVICES": "2,3"})


def test_torchrun_starts_one_node_whatever_a_pod_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run

    pod = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "elsewhere:1"}
    (command,) = commands(replace(WANTED, kind="torchrun"), replace(NODE, left_over=left_over(pod)))
    for name, value in command.environment_in(pod).items():
        monkeypatch.setenv(name, value)
    arguments = run.parse_args(list(command.argv[1:]))
    assert (arguments.nnodes, arguments.node_rank, arguments.rdzv_backend) == ("1", 0, "static")
    assert arguments.rdzv_endpoint == ""
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    arguments = run.parse_args(list(command.argv[1:]))
    assert (arguments.nnodes, arguments.node_rank) == ("1", 0), "as a line from a dry run that is typed in the pod"


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_launchers_said_does_not_reach_the_ranks(kind: Kind) -> None:
    around = {
        "NODE_RANK": "3",
        "GROUP_RANK": "1",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "4",
        "RANK": "7",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMPI_COMM_WORLD_RANK": "1",
        "PALIMPSEST_JOB": "an outer one",
    }
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "13", "NCCL_DEBUG": "INFO", "OMPI_MCA_btl": "tcp"}
    for command in commands(replace(WANTED, kind=kind), replace(NODE, left_over=left_over(around | kept))):
        assert command.environment_in(around | kept) == kept | command.environment
        assert command.environment["PALIMPSEST_JOB"] == "job-1"
        shown = str(command).split(" PALIMPSEST_JOB=")[0]
        assert shown.startswith("env -u CROSS_RANK -u CROSS_SIZE -u GROUP_RANK -u NODE_RANK ")
